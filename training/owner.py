"""Who trains into an output: one driver at a time, on whatever machine and cluster.

``owner.json`` in the output names the driver, which writes it again every few seconds. Another one
takes over when it has seen no such sign for the time that the file itself states, measured by its
own clock, or when the process it names was on this machine and is gone. What the loser still has
running finds another name in the file before it writes, and stops.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime

from pydantic import AwareDatetime, PositiveFloat

from dim.config import StrictModel
from dim.errors import ConfigError, DimError, StorageError
from infra import processes, storage
from infra.storage import Store, Version

OWNER_FILE = "owner.json"
BEATS = 6  # signs of life within the time after which a silent owner counts as dead
_POLL_S = 1.0
_SETTLE_S = 2.0
_JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray's job server tells a job of itself

Say = Callable[[str], None]


class OutputTakenError(DimError):
    """Another driver trains into the output, and lives."""


class LostOutputError(DimError):
    """Another driver has taken over the output of this one, which must not write there again."""


class Owner(StrictModel):
    """A driver, as ``owner.json`` has it.

    Attributes:
        token: of this one run of the driver.
        host, pid: where its process is.
        process: what tells the process from every other (``infra.processes``).
        job: of Ray's job server, if it started the driver.
        since, seen: when it took the output, and when it gave its last sign of life.
        beat: counts these signs.
        timeout_s: without one for so many seconds it counts as dead.
        released: it has ended.
    """

    token: str
    host: str
    pid: int
    process: str
    job: str
    since: AwareDatetime
    seen: AwareDatetime
    beat: int
    timeout_s: PositiveFloat
    released: bool = False

    def __str__(self) -> str:
        job = f", Ray job {self.job}" if self.job else ""
        return (
            f"process {self.pid} on {self.host}{job} (since {self.since}, last sign of life "
            f"{self.seen})"
        )

    def packed(self) -> bytes:
        """As the file has it."""
        return self.model_dump_json(indent=2).encode()

    def ticked(self) -> Owner:
        """After one more sign of life."""
        return self.model_copy(update={"beat": self.beat + 1, "seen": _now()})


@contextmanager
def owning(out: str, *, wait_s: float, timeout_s: float, say: Say) -> Iterator[Lease]:
    """Inside, ``out`` is this driver's; signs of life are given by a thread.

    An owner of which nothing is known is watched until it gives a sign or counts as dead; one that
    lives is waited for.

    Args:
        out: The output.
        wait_s: How long to wait for a living owner to end.
        timeout_s: Without a sign for so long, this driver will count as dead.
        say: Is told what is waited for, who was dead, and that the output was lost.

    Raises:
        OutputTakenError: another driver lives, and did not end in time.
        ConfigError: ``owner.json`` is something else.
        StorageError: it cannot be read or written.
    """
    store = storage.open_store(out)
    lease = Lease(store, _claim(store, _this_driver(timeout_s), wait_s, say), say)
    thread = threading.Thread(target=lease.keep, name="owner", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        lease.release()
        thread.join()


class Lease:
    """A driver's hold on an output. Made by ``owning``."""

    def __init__(self, store: Store, owner: Owner, say: Say) -> None:
        self.owner = owner
        self._store, self._say = store, say
        self._ended = threading.Event()
        self._writing = threading.Lock()

    def keep(self) -> None:
        """Give signs of life until the end, or until somebody else has taken the output."""
        while not self._ended.wait(self.owner.timeout_s / BEATS):
            with suppress(StorageError):  # nobody else can write either; the next one may go well
                if not self._write(self.owner.ticked()):
                    self._say(f"{self._store.uri} was lost to another driver: this one stops")
                    return

    def release(self) -> None:
        """End the signs of life and let the next driver begin at once."""
        self._ended.set()
        with suppress(StorageError):  # then it waits for them in vain, and takes over
            self._write(self.owner.ticked().model_copy(update={"released": True}))

    def _write(self, owner: Owner) -> bool:
        """Whether the output was still this driver's; then ``owner`` stands in the file."""
        with self._writing:
            if self.owner.released:  # while a sign of life was about to be given
                return True
            found = self._store.read_version(OWNER_FILE)
            if found is not None and _parse(self._store, found).token != owner.token:
                return False
            written = self._store.write_version(OWNER_FILE, owner.packed(), found) is not None
            self.owner = owner if written else self.owner
            return written


class Fence:
    """Stands before what a driver's workers write.

    Args:
        out: The output.
        token: Of the driver that began this work; empty: nobody owns the output.
    """

    def __init__(self, out: str, token: str) -> None:
        self._store, self._token = storage.open_store(out), token

    def confirm(self) -> None:
        """Stop where another driver has taken over since; what cannot be read says nothing.

        Raises:
            LostOutputError: names the other one.
        """
        if not self._token:
            return
        try:
            found = self._store.read_version(OWNER_FILE)
        except StorageError:
            return
        if found is None or (owner := _parse(self._store, found)).token == self._token:
            return
        raise LostOutputError(f"{self._store.uri} was taken over by {owner}: this run stops here")


def _claim(store: Store, mine: Owner, wait_s: float, say: Say) -> Owner:
    """Write ``mine`` into the file as soon as it may stand there."""
    began, said = time.monotonic(), False
    watched: tuple[Version | None, float] | None = None  # the latest sign of life, since when
    while True:
        found = store.read_version(OWNER_FILE)
        holder = None if found is None else _parse(store, found)
        now = time.monotonic()
        alive = watched is not None and watched[0] != found
        if watched is None or alive:
            watched = found, now
        if holder is None or holder.released or _is_dead(holder, now - watched[1]):
            if holder is not None and not holder.released:
                say(f"{store.uri} was left by {holder}, which is dead: taking over")
            if _write_alone(store, mine, found):
                return mine
            watched = None
            continue
        if (alive or _lives_here(holder)) and now - began >= wait_s:
            raise OutputTakenError(
                f"{store.uri} is being trained into by {holder}: wait for its end (owner_wait_s), "
                "stop it, or choose another out"
            )
        if not said:
            say(f"{store.uri} is being trained into by {holder}: waiting for a sign of it")
            said = True
        time.sleep(min(_POLL_S, holder.timeout_s / BEATS))


def _write_alone(store: Store, mine: Owner, before: Version | None) -> bool:
    """Write ``mine`` where ``before`` lies; whether it stands there and nobody else's.

    A store that heeds conditions refuses the same write again. In one that does not, another driver
    may write in the same moment: then the last one has won, after a pause in which all who saw
    ``before`` have written.
    """
    if store.write_version(OWNER_FILE, mine.packed(), before) is None:
        return False
    if store.write_version(OWNER_FILE, mine.ticked().packed(), before) is None:
        return True
    time.sleep(_SETTLE_S)
    found = store.read_version(OWNER_FILE)
    return found is not None and _parse(store, found).token == mine.token


def _this_driver(timeout_s: float) -> Owner:
    return Owner(
        token=uuid.uuid4().hex,
        host=socket.gethostname(),
        pid=os.getpid(),
        process=processes.identity(os.getpid()),
        job=_job(),
        since=_now(),
        seen=_now(),
        beat=0,
        timeout_s=timeout_s,
    )


def _is_dead(holder: Owner, silent_s: float) -> bool:
    return silent_s >= holder.timeout_s or processes.has_ended(holder.process, holder.pid)


def _lives_here(holder: Owner) -> bool:
    """Whether its process is on this machine and has given a sign in time, by the same clock."""
    silent = datetime.now(UTC) - holder.seen
    return (
        processes.is_running(holder.process, holder.pid)
        and silent.total_seconds() < holder.timeout_s
    )


def _job() -> str:
    """The submission id, if Ray's job server started this process; else empty."""
    try:
        told = json.loads(os.environ.get(_JOB_CONFIG, ""))
        return str(told["metadata"]["job_submission_id"])
    except (ValueError, KeyError, TypeError):
        return ""


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def _parse(store: Store, found: Version) -> Owner:
    try:
        return Owner.model_validate_json(found.data)
    except ValueError:
        raise ConfigError(
            f"{store.address(OWNER_FILE)} does not say who trains there: delete it if nobody does"
        ) from None
