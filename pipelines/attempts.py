"""A task whose process died is tried again with care, and not for ever.

Ray starts such a task anew by itself, as often as it takes, so a record that ends its process (a
fault in C code, all of the memory, a loop without end) would do so for ever. The first attempt
works as fast as it can, under a time limit. A later one works on one record after another in a
process of its own, and what ends that one is a failed record with a reason. An attempt after
``MOST_ATTEMPTS`` works on nothing: the records of its range fail.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import resource
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

import pyarrow as pa
import ray
from ray import cloudpickle
from ray._private.state import actors  # Ray tells it nowhere else without a dashboard
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_put

from dim.errors import DimError

MOST_ATTEMPTS = 4
"""Attempts at a task that work on something, the first one included."""

_MOST_RESTARTS = 50  # of an actor in a job of days, on machines that come and go
_MOST_DEATHS = 8  # of records of one range; each costs the start of a process
_RECORDS_PER_LIMIT = 8  # a record alone has this part of the time of a range
_START_S = 120.0  # for the start of such a process, on a busy machine
_MOST_MEMORY = 8 << 30  # bytes of a process that works on one record at a time,
_SHARE_OF_MEMORY = 0.25  # and at most this of what the machine has

RangeT = TypeVar("RangeT")
RangeT_contra = TypeVar("RangeT_contra", contravariant=True)


class Work(Protocol[RangeT_contra]):
    """What is done with ranges of records, in parts."""

    def count(self, each: RangeT_contra, /) -> int:
        """How many records a range has."""
        ...

    def parts(self, each: RangeT_contra, /) -> Iterator[Any]:
        """The records of a range in order, some together; a part can be sliced as a list can."""
        ...

    def table(self, part: Any, /) -> pa.Table:
        """What becomes of the records of a part: a row each, in order."""
        ...

    def lost(self, each: RangeT_contra, /, number: int, why: str) -> pa.Table:
        """The row of a record, counted from 0, that could not be worked on: a failed one."""
        ...


@dataclass(frozen=True)
class TimeLimits:
    """How long work may take, in seconds.

    Attributes:
        range_s: a whole range.
        record_s: one record alone, and the first one with the loading of models.
    """

    range_s: float
    record_s: float

    @classmethod
    def of(cls, range_s: float) -> TimeLimits:
        """Those for ranges that take ``range_s`` at most; a record may take an eighth of it."""
        return cls(range_s, range_s / _RECORDS_PER_LIMIT)


@dataclass(frozen=True)
class Attempts(Generic[RangeT]):
    """Work on ranges that no record stops.

    Attributes:
        work: what is done.
        limits: how long it may take.
        ahead: gives the parts as they are, and begins to see to those that follow; if none dies.
    """

    work: Work[RangeT]
    limits: TimeLimits
    ahead: Callable[[Iterator[Any]], Iterator[Any]] = iter

    def tables(self, each: RangeT) -> Iterator[pa.Table]:
        """What becomes of the records of a range, by parts.

        The parts are the same in every attempt, for Ray goes on with the one that came last.

        Raises:
            DimError: not even to say that they failed was possible; or what the work raises.
        """
        number = attempt()
        if number == 0:
            tables = map(self.work.table, self.ahead(self.work.parts(each)))
            return limited(tables, self.limits.range_s)
        if number < MOST_ATTEMPTS:
            return self._one_by_one(each)
        stop_after(2 * MOST_ATTEMPTS)
        return self._lost(each, 0, given_up())

    def _one_by_one(self, each: RangeT) -> Iterator[pa.Table]:
        """The records one after another; one that ends its process is a failed one."""
        size, done, deaths = self.work.count(each), 0, 0
        end = time.monotonic() + 2 * self.limits.range_s
        part: list[pa.Table] = []
        while done < size:
            try:
                for table in self._elsewhere(each, done, end):
                    if table is not None:
                        part.append(table)
                        done += table.num_rows
                    elif part:
                        yield pa.concat_tables(part)
                        part = []
                if done != size:
                    raise DimError(f"a range of {size} records gave {done}")
            except _DiedError as death:
                part.append(self.work.lost(each, done, str(death)))
                done, deaths = done + 1, deaths + 1
            if deaths == _MOST_DEATHS or time.monotonic() > end:
                why = "not tried: others of its range ended their process or took all of the time"
                part += self._lost(each, done, why)
                done = size
        if part:
            yield pa.concat_tables(part)

    def _lost(self, each: RangeT, first: int, why: str) -> Iterator[pa.Table]:
        return (self.work.lost(each, number, why) for number in range(first, self.work.count(each)))

    def _elsewhere(self, each: RangeT, skip: int, end: float) -> Iterator[pa.Table | None]:
        """What becomes of the records after the first ``skip``, from a process of its own.

        Gives a row at a time, and ``None`` after those of a part.

        Raises:
            _DiedError: it ended, or took too long for a record.
        """
        with _process(self, each, skip) as (process, results):
            allowed = _START_S
            while True:
                seconds = max(0.0, min(allowed, end - time.monotonic()))
                if not results.poll(seconds):
                    raise _DiedError(f"it was not done in {seconds:.0f} s")
                try:
                    found = results.recv()
                except (EOFError, OSError):
                    process.join()
                    raise _DiedError(f"its process {_ending(process.exitcode)}") from None
                allowed = self.limits.record_s
                if isinstance(found, Exception):
                    raise found
                if not isinstance(found, str):
                    yield found
                elif found == _DONE:
                    return

    def send(self, each: RangeT, skip: int, results: Connection) -> None:
        """The other end of it."""
        done = 0
        try:
            results.send(_READY)
            for part in self.work.parts(each):
                first = max(0, skip - done)
                for number in range(first, len(part)):
                    results.send(self.work.table(part[number : number + 1]))
                done += len(part)
                results.send(None)
        except BrokenPipeError:
            return
        except Exception as error:
            results.send(error if _travels(error) else DimError(f"{type(error).__name__}: {error}"))
        else:
            results.send(_DONE)


def attempt() -> int:
    """How often the task that this thread works on was begun before; 0 outside of a task.

    Ray Data calls a class in another thread, unless it is told that it may be called by several or
    gives its results one after another: there it is always 0.
    """
    worker: Any = ray._private.worker.global_worker  # Ray tells a task of it nowhere else
    number = worker.core_worker.get_current_task_attempt_number() if worker.connected else 0
    return _begun(worker.current_task_id.hex(), number) if number else 0


@lru_cache(maxsize=64)
def _begun(task: str, number: int) -> int:
    """How often a task was begun before, of which Ray says that it is attempt ``number`` > 0.

    Ray counts as well how often it could not reach a worker: where that one's machine is gone, once
    a second until it knows. So each attempt that begins leaves a number in Ray's control; the
    first one, which leaves none, is taken to have begun.
    """
    key = f"dim/begun/{task}"
    before = int(_internal_kv_get(key) or 0) + 1
    _internal_kv_put(key, str(before), overwrite=True)
    return before


def is_given_up() -> bool:
    """Whether the task was begun so often that what it works on fails."""
    return attempt() >= MOST_ATTEMPTS


def given_up() -> str:
    """Why that fails."""
    return (
        f"the process that worked on its range ended {attempt()} times (by a fault, for memory or "
        "time, or with its machine)"
    )


def stop_after(attempts: int = MOST_ATTEMPTS) -> None:
    """End a task that was begun too often, where nothing of it can fail by itself.

    Raises:
        DimError: it was.
    """
    if attempt() >= attempts:
        raise DimError(given_up())


def stop_after_restarts() -> None:
    """End a job whose worker dies again and again, mostly before it has loaded its model.

    For the constructor of a worker that keeps something; Ray would start it for ever.

    Raises:
        DimError: it was started too often.
    """
    number = _restarts()
    if number >= _MOST_RESTARTS:
        raise DimError(
            f"a worker's process ended {number} times, the last time while it was started or soon "
            "after: what it loads may need more memory than there is"
        )


def _restarts() -> int:
    """How often Ray has started the actor that this process is; 0 outside of an actor."""
    actor = ray.get_runtime_context().get_actor_id() if ray.is_initialized() else None
    return int(actors(actor_id=actor).get("NumRestarts", 0)) if actor else 0


class _DiedError(Exception):
    """A process of its own came to its end before it had done its work."""


_READY, _DONE = "ready", "done"


def limited(tables: Iterator[pa.Table], seconds: float) -> Iterator[pa.Table]:
    """The same tables; ends the process, also within C code, when making them takes too long.

    Only the making counts, not what is done with them.
    """
    left = seconds
    while True:
        began = time.monotonic()
        with _deadline(began + left):
            table = next(tables, None)
        if table is None:
            return
        left -= time.monotonic() - began
        yield table


_deadlines: list[float] = []
_changing = threading.Lock()


@contextmanager
def _deadline(end: float) -> Iterator[None]:
    """Ends the process if the block has not come to its end by then.

    There is one timer for all threads, which is set to the first of their deadlines.
    """
    with _changing:
        _deadlines.append(end)
        _set_timer()
    try:
        yield
    finally:
        with _changing:
            _deadlines.remove(end)
            _set_timer()


def _set_timer() -> None:
    if _deadlines:
        left = min(_deadlines) - time.monotonic()
        faulthandler.dump_traceback_later(max(left, 0.001), exit=True)
    else:
        faulthandler.cancel_dump_traceback_later()


@contextmanager
def _process(
    attempts: Attempts[RangeT], each: RangeT, skip: int
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """A process that sends what :meth:`Attempts.send` does."""
    # Not forked: a worker of Ray has threads that hold locks.
    context = multiprocessing.get_context("spawn")
    results, sender = context.Pipe(duplex=False)
    pickled = cloudpickle.dumps((attempts, each, skip))
    process = context.Process(target=_alone, args=(pickled, sender), daemon=True)
    process.start()
    sender.close()
    try:
        yield process, results
    finally:
        process.kill()
        process.join()
        results.close()


def _alone(pickled: bytes, results: Connection) -> None:
    """What such a process runs."""
    _limit_memory()
    attempts, each, skip = cloudpickle.loads(pickled)
    # Its parent may have died without it, and then nobody ends what does not end.
    faulthandler.dump_traceback_later(2 * attempts.limits.range_s, exit=True)
    attempts.send(each, skip, results)


def _limit_memory() -> None:
    """A record that wants all of the memory gets an error, and not another process its end."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    most = min(_MOST_MEMORY, int(machine * _SHARE_OF_MEMORY))
    with suppress(ValueError):  # a lower limit is there already
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def _travels(error: Exception) -> bool:
    """Whether another process gets the same error."""
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)  # noqa: S301
    except Exception:
        return False


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"was ended by {name}{' (mostly for memory)' if name == 'SIGKILL' else ''}"
    return f"ended by itself with status {code}"
