"""Requests that nobody waits for: for clients behind a proxy that cuts long connections.

A job's record lies in the object store, so that every ingress replica can tell of it. The replica
that took it does the work, and a job is lost with it: its record then says so after its deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from infra.storage import open_store
from serving.config import ServingConfig
from serving.errors import BadRequestError, NotFoundError, error_response
from serving.protocol import ErrorBody, Job

GRACE_S = 30
"""After its deadline a job may still be writing its record."""

LOOK_S = 1.0
"""How often a running job looks whether another replica was told to cancel it."""

_ID = re.compile(r"[0-9a-f]{32}")


class Background:
    """The jobs of an ingress replica, and the records of all."""

    def __init__(self, config: ServingConfig) -> None:
        self._store = None if config.object_store is None else open_store(config.object_store)
        self._timeout_s = config.request_timeout_s
        self._running: dict[str, asyncio.Task[None]] = {}

    def check(self) -> None:
        """Refuse where jobs cannot be kept.

        Raises:
            BadRequestError: the server has no object store.
        """
        if self._store is None:
            raise BadRequestError(
                "async: this server has no object store to keep jobs in; stream=true holds a "
                "connection open while it works",
                param="async",
            )

    async def start(self, work: Callable[[], Awaitable[Any]], ended: Callable[[], None]) -> Job:
        """Begin ``work``, whose answer is the job's result; ``ended`` is called in any case.

        Raises:
            StorageError: the record cannot be written; nothing was begun.
        """
        now = time.time()
        job = Job(id=uuid.uuid4().hex, created_at=int(now), deadline=int(now + self._timeout_s))
        try:
            await self._write(job)
        except BaseException:
            ended()
            raise
        task = asyncio.create_task(self._run(job, work))
        self._running[job.id] = task
        task.add_done_callback(lambda _: self._running.pop(job.id, None))
        task.add_done_callback(lambda _: ended())
        return job

    async def find(self, id: str) -> Job:
        """The record of a job.

        Raises:
            NotFoundError: there is none of this name.
        """
        if self._store is None or not _ID.fullmatch(id):
            raise _no_such(id)
        found = await asyncio.to_thread(self._store.read_version, _record(id))
        if found is None:
            raise _no_such(id)
        job = Job.model_validate_json(found.data)
        if job.status == "running" and time.time() > job.deadline + GRACE_S:
            error = ErrorBody(
                message="the job was lost with the replica that did it; ask again",
                type="server_error", param=None, code="job_lost",
            )  # fmt: skip
            return job.model_copy(update={"status": "failed", "error": error})
        return job

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

    async def _run(self, job: Job, work: Callable[[], Awaitable[Any]]) -> None:
        async def do() -> Any:
            return await work()

        doing = asyncio.create_task(do())
        watching = asyncio.create_task(self._watch(job.id, doing))
        try:
            done: dict[str, Any] = {"status": "succeeded", "result": await doing}
        except asyncio.CancelledError:
            doing.cancel()
            await asyncio.wait([doing])
            done = {"status": "cancelled"}
        except Exception as error:
            said = json.loads(bytes(error_response(error).body))["error"]
            done = {"status": "failed", "error": ErrorBody(**said)}
        finally:
            watching.cancel()
        await self._write(job.model_copy(update=done))

    async def _watch(self, id: str, doing: asyncio.Task[Any]) -> None:
        assert self._store is not None
        while True:
            await asyncio.sleep(LOOK_S)
            with contextlib.suppress(Exception):  # a store that is busy says it the next time
                if await asyncio.to_thread(self._store.is_file, _cancelled(id)):
                    doing.cancel()

    async def _write(self, job: Job) -> None:
        assert self._store is not None
        data = await asyncio.to_thread(job.model_dump_json)
        await asyncio.to_thread(self._store.write, _record(job.id), data.encode())


def _record(id: str) -> str:
    return f"jobs/{id}.json"


def _cancelled(id: str) -> str:
    return f"jobs/{id}.cancelled"


def _no_such(id: str) -> NotFoundError:
    return NotFoundError(f"there is no job {id[:40]!r}", param="id", code="job_not_found")
