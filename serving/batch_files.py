"""A batch as OpenAI lays it out: requests a line in, answers a line out, and how far it has come.

What has been answered lies in the output folder, a file for each request, until all of it has and
the files of answers and errors are written. So a batch that is killed goes on where it was.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dim.errors import InputError, StorageError
from dim.records import sha256_hex
from infra.storage import Store, open_file, open_store

STATE, OUTPUT, ERRORS, RESULTS = "batch.json", "output.jsonl", "errors.jsonl", "results"
_MOST_LINE = 64 << 20  # bytes: an edit with its pictures in base64
_AT_ONCE = 16  # files read at a time

Route = Literal["/v1/images/edits", "/v1/images/generations", "/v1/blueprints"]
PAINTING = ("/v1/images/edits", "/v1/images/generations")


class Line(BaseModel):
    """A request of the input."""

    model_config = ConfigDict(extra="forbid")

    custom_id: str = Field(min_length=1, max_length=512)
    method: Literal["POST"]
    url: Route
    body: dict[str, Any]


class Counts(BaseModel):
    """How many requests there are, and what became of them."""

    total: int
    completed: int = 0
    failed: int = 0


class State(BaseModel):
    """OpenAI's batch object; files are named by their addresses. ``input_sha256`` is ours."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str | None
    input_file_id: str
    input_sha256: str
    status: Literal["in_progress", "completed"] = "in_progress"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    completed_at: int | None = None
    request_counts: Counts


@dataclass(frozen=True)
class Input:
    """A checked input file.

    Attributes:
        address: of it.
        sha256: of its bytes.
        names: the ``custom_id`` of each request, in order.
        endpoint: the route of all of them; ``None``: of several.
    """

    address: str
    sha256: str
    names: tuple[str, ...]
    endpoint: str | None


def read_input(address: str) -> Input:
    """Look through an input file before anything of it is asked.

    Raises:
        InputError: a line is no request, or two have one ``custom_id``; the line is named.
        StorageError: it cannot be read.
    """
    places: dict[str, int] = {}
    routes, digest = set[str](), hashlib.sha256()
    for number, text in _texts(address):
        digest.update(text)
        line = _parse(text, f"{address}, line {number}")
        if line is None:
            continue
        if line.custom_id in places:
            raise InputError(
                f"{address}, line {number}: the custom_id {line.custom_id!r} is that of line "
                f"{places[line.custom_id]} too"
            )
        places[line.custom_id] = number
        routes.add(line.url)
    if not places:
        raise InputError(f"{address} holds no request")
    endpoint = routes.pop() if len(routes) == 1 else None
    return Input(address, digest.hexdigest(), tuple(places), endpoint)


class Batch:
    """A batch in its output folder.

    Args:
        input: what is asked.
        out: address of the folder.

    Raises:
        InputError: the folder is that of another input.
        StorageError: it cannot be read or written.
    """

    def __init__(self, input: Input, out: str) -> None:
        self.input = input
        self.store = open_store(out)
        self.state = _read_state(self.store) or self._begin()
        if self.state.input_sha256 != input.sha256:
            raise InputError(
                f"{out} is the batch of another input ({self.state.input_file_id}, or the same "
                "file before it was changed): choose another folder"
            )
        names = {name for name, _ in self.store.list(RESULTS, suffix=".json")}
        self.done = {name for name in input.names if _result(name) in names}

    def left(self) -> Iterator[Line]:
        """The requests that have not been answered, in order."""
        for number, text in _texts(self.input.address):
            line = _parse(text, f"{self.input.address}, line {number}")
            if line is not None and line.custom_id not in self.done:
                yield line

    def write(self, line: Line, answer: dict[str, Any]) -> None:
        """Keep what became of a request: ``response`` and ``error``, as in OpenAI's files."""
        name = sha256_hex(line.custom_id.encode())
        said = {"id": f"batch_req_{name[:32]}", "custom_id": line.custom_id, **answer}
        self.store.write(_result(line.custom_id), json.dumps(said).encode())

    def finish(self) -> State:
        """Write the files of answers and errors, in the order of the input; then say so."""
        failed = []
        with self.store.open_output(OUTPUT) as file:
            for data in self._results():
                if is_answer(json.loads(data)):
                    file.write(data + b"\n")
                else:
                    failed.append(data + b"\n")  # a sentence each
        if failed:
            self.store.write(ERRORS, b"".join(failed))
        total = len(self.input.names)
        counts = Counts(total=total, completed=total - len(failed), failed=len(failed))
        self.state = self.state.model_copy(
            update={
                "status": "completed",
                "completed_at": int(time.time()),
                "request_counts": counts,
                "output_file_id": self.store.address(OUTPUT),
                "error_file_id": self.store.address(ERRORS) if failed else None,
            }
        )
        self._write_state()
        return self.state

    def tidy(self) -> None:
        """Remove what a finished batch needs no longer."""
        self.store.delete(RESULTS)

    def _results(self) -> Iterator[bytes]:
        names = [_result(name) for name in self.input.names]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            for first in range(0, len(names), _AT_ONCE):
                yield from pool.map(self.store.read, names[first : first + _AT_ONCE])

    def _begin(self) -> State:
        self.state = State(
            id=f"batch_{uuid.uuid4().hex}",
            endpoint=self.input.endpoint,
            input_file_id=self.input.address,
            input_sha256=self.input.sha256,
            created_at=int(time.time()),
            request_counts=Counts(total=len(self.input.names)),
        )
        self._write_state()
        return self.state

    def _write_state(self) -> None:
        self.store.write(STATE, f"{self.state.model_dump_json(indent=2)}\n".encode())


def is_answer(said: dict[str, Any]) -> bool:
    """Whether a line of a result belongs into the file of answers."""
    response = said["response"]
    return response is not None and response["status_code"] == 200


def _texts(address: str) -> Iterator[tuple[int, bytes]]:
    """The lines of a file, numbered from 1; never more than one of them is in memory."""
    store, name = open_file(address)
    with store.open_input(name) as file, io.BufferedReader(file, 1 << 20) as lines:
        number = 0
        while text := lines.readline(_MOST_LINE + 1):
            number += 1
            if len(text) > _MOST_LINE:
                raise InputError(f"{address}, line {number} is over {_MOST_LINE:,} bytes")
            yield number, text


def _parse(text: bytes, where: str) -> Line | None:
    """The request of a line; ``None`` if it is blank."""
    if not text.strip():
        return None
    try:
        return Line.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        what = ".".join(map(str, first["loc"]))
        raise InputError(f"{where}: {what}: {first['msg']}".replace(": : ", ": ")) from None


def _read_state(store: Store) -> State | None:
    if not store.is_file(STATE):
        return None
    try:
        return State.model_validate_json(store.read(STATE))
    except ValidationError:
        raise StorageError(f"{store.address(STATE)} is no batch: choose another folder") from None


def _result(custom_id: str) -> str:
    return f"{RESULTS}/{sha256_hex(custom_id.encode())}.json"
