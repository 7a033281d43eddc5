"""Requests that nobody waits for: for clients behind a proxy that cuts long connections.

A job's record lies in the object store, so that every ingress replica can tell of it. The replica
that took it does the work, and a job is lost with it: its record then says so after its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Header, Query, Request
from pydantic import BaseModel

from infra.storage import open_store
from serving.config import ServingConfig
from serving.errors import BadRequestError, NotFoundError, error_response
from serving.protocol import ErrorBody, Job

GRACE_S = 30
"""After its deadline a job may still be writing its record."""

LOOK_S = 1.0
"""How often a running job looks whether another replica was told to cancel it."""

_MOST_KEY = 255

_ID = re.compile(r"[0-9a-f]{32}")


class Kept(BaseModel):
    """A record: the job, of which request it is, and with which status it is answered.

    ``attempt`` is another each time, or two replicas that begin one job in one second would write
    the same bytes, and each take the record for its own.
    """

    job: Job
    fingerprint: str
    attempt: str
    http_status: int = 500


@dataclass(frozen=True)
class How:
    """How a request is to be answered.

    ``later``: with a job. ``key``: a name of the answer, so that the same question is not done
    twice; ``None``: it has none.
    """

    later: bool
    key: str | None


async def read_how(
    request: Request,
    later: Annotated[bool, Query(alias="async", description="Answer at once with a job.")] = False,
    key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=_MOST_KEY,
            description="The same key gets the same answer; nothing is painted twice.",
        ),
    ] = None,
) -> How:
    """What query and headers say of it. A key is the client's own, and of one route."""
    if key is None:
        return How(later, None)
    client = request.scope.get("state", {}).get("client", "")
    return How(
        later, hashlib.sha256(f"{client}\0{request.url.path}\0{key}".encode()).hexdigest()[:32]
    )


def fingerprint(fields: BaseModel, *pictures: bytes | None) -> str:
    """Equal for equal requests, in a form or in JSON."""
    digest = hashlib.sha256()
    said = fields.model_dump_json(exclude={"image", "images", "mask"})
    for part in (said.encode(), *pictures):
        digest.update(hashlib.sha256(part or b"").digest())
    return digest.hexdigest()


class Background:
    """The jobs of an ingress replica, and the records of all."""

    def __init__(self, config: ServingConfig) -> None:
        self._store = None if config.object_store is None else open_store(config.object_store)
        self._timeout_s = config.request_timeout_s
        self._running: dict[str, asyncio.Task[None]] = {}

    def check(self, param: str) -> None:
        """Refuse where jobs cannot be kept.

        Raises:
            BadRequestError: the server has no object store.
        """
        if self._store is None:
            raise BadRequestError(
                f"{param}: this server has no object store to keep answers in", param=param
            )

    async def start(
        self,
        work: Callable[[], Awaitable[Any]],
        ended: Callable[[], None],
        fingerprint: str,
        key: str | None = None,
    ) -> Job:
        """Begin ``work``, whose answer is the job's result; ``ended`` is called in any case.

        Where ``key`` has a job already, that is the answer, and nothing is begun.

        Raises:
            BadRequestError: the key's job is another request's.
            StorageError: the record cannot be written; nothing was begun.
        """
        now = time.time()
        job = Job(
            id=key or uuid.uuid4().hex,
            created_at=int(now),
            deadline=int(now + self._timeout_s),
        )
        kept = Kept(job=job, fingerprint=fingerprint, attempt=uuid.uuid4().hex)
        try:
            known = await self._begin(kept)
        except BaseException:
            ended()
            raise
        if known is not None:
            ended()
            if known.fingerprint != fingerprint:
                raise BadRequestError(
                    "Idempotency-Key: it was used for another request; take a new one",
                    param="Idempotency-Key",
                )
            return known.job
        task = asyncio.create_task(self._run(kept, work))
        self._running[job.id] = task
        task.add_done_callback(lambda _: self._running.pop(job.id, None))
        task.add_done_callback(lambda _: ended())
        return job

    async def answer(self, id: str) -> tuple[Job, int]:
        """A job once it has ended, and the HTTP status of its answer."""
        while (kept := await self._find(id)).job.status == "running":
            # Not the task itself: who waits may go, and the job goes on.
            tasks = [self._running[id]] if id in self._running else []
            await (asyncio.wait(tasks) if tasks else asyncio.sleep(LOOK_S))
        return kept.job, 200 if kept.job.status == "succeeded" else kept.http_status

    async def find(self, id: str) -> Job:
        """The record of a job.

        Raises:
            NotFoundError: there is none of this name.
        """
        return (await self._find(id)).job

    async def _find(self, id: str) -> Kept:
        if self._store is None or not _ID.fullmatch(id):
            raise _no_such(id)
        found = await asyncio.to_thread(self._store.read_version, _record(id))
        if found is None:
            raise _no_such(id)
        kept = await asyncio.to_thread(Kept.model_validate_json, found.data)
        job = kept.job
        if job.status == "running" and time.time() > job.deadline + GRACE_S:
            error = ErrorBody(
                message="the job was lost with the replica that did it; ask again",
                type="server_error", param=None, code="job_lost",
            )  # fmt: skip
            lost = job.model_copy(update={"status": "failed", "error": error})
            return kept.model_copy(update={"job": lost})
        return kept

    async def cancel(self, id: str) -> Job:
        """End a job if it still runs; its place is free at once where this replica does it.

        Raises:
            NotFoundError: there is none of this name.
        """
        job = await self.find(id)
        if job.status != "running":
            return job
        task = self._running.get(id)
        if task is None:  # another replica's, which looks for this
            assert self._store is not None
            await asyncio.to_thread(self._store.write, _cancelled(id), b"")
            return job
        task.cancel()
        await asyncio.wait([task])
        return await self.find(id)

    async def _run(self, kept: Kept, work: Callable[[], Awaitable[Any]]) -> None:
        async def do() -> Any:
            return await work()

        doing = asyncio.create_task(do())
        watching = asyncio.create_task(self._watch(kept.job.id, doing))
        status = 200
        try:
            done: dict[str, Any] = {"status": "succeeded", "result": await doing}
        except asyncio.CancelledError:
            doing.cancel()
            await asyncio.wait([doing])
            error = ErrorBody(
                message="the job was cancelled", type="invalid_request_error", param=None,
                code="job_cancelled",
            )  # fmt: skip
            done, status = {"status": "cancelled", "error": error}, 409
        except Exception as error:
            response = error_response(error)
            said = json.loads(bytes(response.body))["error"]
            done, status = {"status": "failed", "error": ErrorBody(**said)}, response.status_code
        finally:
            watching.cancel()
        job = kept.job.model_copy(update=done)
        await self._write(kept.model_copy(update={"job": job, "http_status": status}))

    async def _watch(self, id: str, doing: asyncio.Task[Any]) -> None:
        assert self._store is not None
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(Exception):  # a store that is busy says it the next time
                if await asyncio.to_thread(self._store.is_file, _cancelled(id)):
                    doing.cancel()

    async def _begin(self, kept: Kept) -> Kept | None:
        """Write the first record; ``None``, or the one that is there already."""
        assert self._store is not None
        name, data = _record(kept.job.id), kept.model_dump_json().encode()
        if await asyncio.to_thread(self._store.write_version, name, data, None) is not None:
            return None
        return await self._find(kept.job.id)

    async def _write(self, kept: Kept) -> None:
        assert self._store is not None
        data = await asyncio.to_thread(kept.model_dump_json)
        await asyncio.to_thread(self._store.write, _record(kept.job.id), data.encode())


def _record(id: str) -> str:
    return f"jobs/{id}.json"


def _cancelled(id: str) -> str:
    return f"jobs/{id}.cancelled"


def _no_such(id: str) -> NotFoundError:
    return NotFoundError(f"there is no job {id[:40]!r}", param="id", code="job_not_found")
