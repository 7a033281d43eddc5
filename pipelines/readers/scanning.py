"""Scanning: many files of an input are looked at by tasks, and few by the driver itself."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError

from dim.failures import find_dim_error
from pipelines.cluster import connect

_FEW = 8  # files; to start tasks for them would take longer
_MOST_TASKS = 2_000  # each costs the driver a few ms

FileT = TypeVar("FileT")
ScannedT = TypeVar("ScannedT")


def in_tasks(scan: Callable[[FileT], ScannedT], files: Sequence[FileT]) -> Iterator[ScannedT]:
    """What a scan gives for each file, in order.

    Args:
        scan: looks at a file; it travels to tasks.
        files: all of them.

    Raises:
        DimError: whatever the scan raises, of the first file for which it does.
    """
    if len(files) < _FEW:
        yield from map(scan, files)
        return
    connect()
    run: Any = ray.remote(_scan).options(scheduling_strategy="SPREAD")
    shared, each = ray.put(scan), -(-len(files) // _MOST_TASKS)
    tasks = [
        run.remote(shared, files[first : first + each]) for first in range(0, len(files), each)
    ]
    tasks.reverse()
    while tasks:
        try:
            yield from ray.get(tasks.pop())  # which is then all that holds what was found
        except RayTaskError as error:
            raise find_dim_error(error) or error from None


def _scan(scan: Callable[[FileT], ScannedT], files: Sequence[FileT]) -> list[ScannedT]:
    return list(map(scan, files))
