"""``dim batch``: many requests to a server, from a file of OpenAI's batch layout.

Killed at any moment and run again, it asks only for what has no answer yet; what was being done is
asked for under the same ``Idempotency-Key``, so that the server paints nothing twice.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import aiohttp
import typer
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type

from dim.errors import DimError, InputError
from dim.records import sha256_hex
from dim.retry_after import retry_after_s
from serving.batch_files import PAINTING, Batch, Line, State, read_input

LONGEST_PAUSE_S = 60.0
TELL_S = 15.0

BUSY = (429, 503)
"""Nothing was begun: the same request, under the same key, until it is let in."""
BROKEN = (500, 504)
"""It was begun and failed, and another time may go well; its key answers so from now on."""
CLOSED = (401, 403)
"""Nobody will be let in."""


class BatchStopped(DimError):
    """Nothing more can be asked of the server for now; what was answered is kept."""


@dataclass(frozen=True)
class Server:
    """Whom to ask, and how patiently.

    Attributes:
        url: of the server, without ``/v1``.
        key: API key; ``None``: it asks for none.
        attempts: at a request that fails on the server's side.
        patience_s: how long a server may be busy or not there, before the batch stops.
        timeout_s: for one answer.
    """

    url: str
    key: str | None = None
    attempts: int = 3
    patience_s: float = 600.0
    timeout_s: float = 900.0


@dataclass(frozen=True)
class Answer:
    """What a server said: ``body`` is JSON, or ``None`` where it is not."""

    status: int
    headers: Mapping[str, str]
    body: Any

    @property
    def error(self) -> dict[str, Any]:
        """OpenAI's ``error``, if it is there."""
        error = self.body.get("error") if isinstance(self.body, dict) else None
        return error if isinstance(error, dict) else {}


class _Again(Exception):
    """The request is to be sent again, after ``wait_s`` if the server said so."""

    def __init__(self, why: str, wait_s: float | None = None) -> None:
        super().__init__(why)
        self.wait_s = wait_s


class Asker:
    """Asks a server one request after the other, each until there is an answer to keep.

    Args:
        session: to ask with.
        server: whom.
        batch: the name that makes its keys its own.
    """

    def __init__(self, session: aiohttp.ClientSession, server: Server, batch: str) -> None:
        self._session = session
        self._server = server
        self._batch = batch
        self.keyed = True
        """Whether the server keeps answers by ``Idempotency-Key``."""

    async def ask(self, line: Line) -> dict[str, Any]:
        """``response`` and ``error`` of a request, as OpenAI's files have them.

        Raises:
            BatchStopped: the server lets nobody in, is busy or away for too long.
        """
        said, broken = dict[str, Any](), 0
        for _ in range(self._server.attempts):
            try:
                answer = await self._until_let_in(line, broken)
            except TimeoutError:  # it may still come: the next time under the same key
                message = f"no answer in {self._server.timeout_s:g} s"
                said = {"response": None, "error": {"code": "timeout", "message": message}}
                continue
            said = kept(answer)
            if answer.status not in BROKEN:
                break
            broken += 1
        return said

    async def _until_let_in(self, line: Line, broken: int) -> Answer:
        """The answer to a request that failed ``broken`` times, however often it is put off."""
        trying = AsyncRetrying(
            retry=retry_if_exception_type(_Again), wait=_pause, stop=self._has_lost_patience,
            reraise=True,
        )  # fmt: skip
        try:
            return await trying(self._send, line, broken)
        except _Again as error:
            raise BatchStopped(
                f"{self._server.url} {error} for {self._server.patience_s:g} s; what was answered "
                "is kept, and the same command goes on"
            ) from None

    async def _send(self, line: Line, broken: int) -> Answer:
        keyed = self.keyed
        headers = {"Idempotency-Key": self._idempotency_key(line, broken)} if keyed else {}
        if self._server.key is not None:
            headers["Authorization"] = f"Bearer {self._server.key}"
        try:
            async with self._session.post(
                f"{self._server.url}{line.url}", json=behind_others(line), headers=headers,
                allow_redirects=False,
            ) as response:  # fmt: skip
                answer = Answer(response.status, response.headers, _json(await response.read()))
        except TimeoutError:
            raise
        except aiohttp.ClientError as error:
            raise _Again(f"cannot be reached ({error})") from None
        if answer.status in CLOSED:
            raise BatchStopped(f"{self._server.url}: {answer.error.get('message', 'not let in')}")
        if answer.status in BUSY:
            raise _Again("was busy", retry_after_s(answer.headers))
        if keyed and answer.status == 400 and answer.error.get("param") == "Idempotency-Key":
            self.keyed = False
            raise _Again("keeps no answers", 0.0)
        return answer

    def _idempotency_key(self, line: Line, broken: int) -> str:
        return sha256_hex(f"{self._batch}\0{line.custom_id}\0{broken}".encode())

    def _has_lost_patience(self, state: RetryCallState) -> bool:
        return (state.seconds_since_start or 0.0) >= self._server.patience_s


def behind_others(line: Line) -> dict[str, Any]:
    """The body of a request; what is painted waits for others, unless it says which tier it has."""
    return {"service_tier": "flex", **line.body} if line.url in PAINTING else line.body


def kept(answer: Answer) -> dict[str, Any]:
    """An answer as it stands in OpenAI's files."""
    if answer.body is None:
        message = f"the server answered {answer.status}, and no JSON"
        return {"response": None, "error": {"code": "invalid_answer", "message": message}}
    response = {
        "status_code": answer.status,
        "request_id": answer.headers.get("X-Request-ID", ""),
        "body": answer.body,
    }
    return {"response": response, "error": None}


async def ask_all(batch: Batch, server: Server, concurrency: int) -> bool:
    """Ask for everything that has no answer yet, so many at a time, and keep what is answered.

    Returns:
        Whether the server keeps answers too, so that nothing was done twice.

    Raises:
        BatchStopped: see ``Asker.ask``.
    """
    told = time.monotonic()
    timeout = aiohttp.ClientTimeout(total=server.timeout_s)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        asker = Asker(session, server, batch.state.id)
        places = asyncio.Semaphore(concurrency)
        left = batch.left()

        async def answer(line: Line) -> None:
            nonlocal told
            try:
                said = await asker.ask(line)
                await asyncio.to_thread(batch.write, line, said)
            finally:
                places.release()
            batch.done.add(line.custom_id)
            if time.monotonic() - told >= TELL_S:
                told = time.monotonic()
                typer.echo(f"{len(batch.done)} of {len(batch.input.names)} answered", err=True)

        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    await places.acquire()
                    line = await asyncio.to_thread(next, left, None)
                    if line is None:
                        break
                    group.create_task(answer(line))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return asker.keyed


def run(address: str, out: str, server: Server, concurrency: int) -> State:
    """Do a batch, or what is left of it; errors as of ``read_input``, ``Batch`` and ``ask_all``."""
    batch = Batch(read_input(address), out)
    if batch.state.status != "completed":
        if batch.done:
            typer.echo(f"{len(batch.done)} of {len(batch.input.names)} are answered", err=True)
        if not asyncio.run(ask_all(batch, server, concurrency)):
            typer.echo(
                f"{server.url} keeps no answers (it has no object_store): what is cut off is "
                "painted again",
                err=True,
            )
        batch.finish()
    batch.tidy()
    return batch.state


def _pause(state: RetryCallState) -> float:
    error = state.outcome.exception() if state.outcome else None
    asked = error.wait_s if isinstance(error, _Again) else None
    return min(0.5 * 2**state.attempt_number if asked is None else asked, LONGEST_PAUSE_S)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def main(
    requests: Annotated[
        str, typer.Argument(metavar="INPUT.jsonl", help="Requests, in OpenAI's batch layout.")
    ],
    out: Annotated[str, typer.Option(help="Folder of answers and errors, local or s3://.")],
    url: Annotated[str, typer.Option(help="The server, such as http://127.0.0.1:8000.")],
    api_key_env: Annotated[
        str, typer.Option(help="The variable that holds the API key, if there is one.")
    ] = "DIM_API_KEY",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at a time.")] = 8,
    attempts: Annotated[
        int, typer.Option(min=1, help="At a request that fails on the server's side.")
    ] = 3,
    patience: Annotated[
        float, typer.Option(min=1, help="Seconds that the server may be busy or away.")
    ] = 600.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds for one answer.")] = 900.0,
) -> None:
    """Have a server do a file of requests; killed and run again, it goes on where it was.

    Writes output.jsonl, errors.jsonl (if there are any) and batch.json into --out.
    """
    base = url.rstrip("/").removesuffix("/v1")
    if not base.startswith(("http://", "https://")):
        raise InputError(f"--url is {url!r}, and must begin with http:// or https://")
    key = os.environ.get(api_key_env) or None
    state = run(requests, out, Server(base, key, attempts, patience, timeout), concurrency)
    counts = state.request_counts
    typer.echo(f"{counts.total} requests: {counts.completed} answered, {counts.failed} failed")
    typer.echo(f"answers: {state.output_file_id}")
    if state.error_file_id is not None:
        typer.echo(f"errors: {state.error_file_id}")


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
