"""From the first worker to the driver's console: what it says and measures."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

OnProgress = Callable[[Sequence[str], Mapping[str, float]], None]
"""Is told the lines that rank 0 has said since the last call, and the latest metrics."""

Teller = Callable[[Sequence[str], Mapping[str, float]], None]
"""Takes lines and metrics to the driver, where it still listens."""

_LISTEN_SECONDS, _ARRIVES_SECONDS = 0.5, 0.2


class _Board:
    """What rank 0 has said since the driver looked, and the latest metrics.

    An actor, whose calls by one worker are made in their order. (Ray's own queue is an asynchronous
    one, which keeps no order of calls that are not waited for.)
    """

    def __init__(self) -> None:
        self._lines: list[str] = []
        self._metrics: dict[str, float] = {}
        self._new = False

    def put(self, lines: Sequence[str], metrics: Mapping[str, float]) -> None:
        self._lines += lines
        self._metrics |= metrics
        self._new = True

    def take(self) -> tuple[list[str], dict[str, float]] | None:
        """What is new; ``None`` if nothing is."""
        if not self._new:
            return None
        lines, self._lines, self._new = self._lines, [], False
        return lines, self._metrics


@contextmanager
def watch(run_id: str, on_progress: OnProgress | None) -> Iterator[None]:
    """Tell ``on_progress`` what rank 0 of a run says, while the trainer blocks this thread."""
    if on_progress is None:
        yield
        return
    # On the driver's node: a worker's may be lost, and the run goes on.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"name": _name(run_id), "num_cpus": 0, "scheduling_strategy": here}
    board: Any = ray.remote(_Board).options(**options).remote()
    stopped = threading.Event()

    def show() -> bool:
        with suppress(RayError):
            if (told := ray.get(board.take.remote())) is not None:
                on_progress(*told)
                return True
        return False

    def look() -> None:
        while not stopped.wait(_LISTEN_SECONDS):
            show()

    thread = threading.Thread(target=look, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopped.set()
        thread.join()
        time.sleep(_ARRIVES_SECONDS)  # what a worker said last, which it did not wait for
        while show():
            time.sleep(_ARRIVES_SECONDS)
        ray.kill(board)


def find_teller(run_id: str) -> Teller | None:
    """A worker's way to the driver that watches the run; ``None`` where none does.

    What the driver has not yet taken is kept, a hundred bytes a line.
    """
    if not ray.is_initialized():
        return None
    try:
        board = ray.get_actor(_name(run_id))
    except ValueError:
        return None

    def tell(lines: Sequence[str], metrics: Mapping[str, float]) -> None:
        board.put.remote(list(lines), dict(metrics))  # waits for nobody

    return tell


@contextmanager
def progress_bar(console: Console, name: str) -> Iterator[OnProgress]:
    """A bar on ``console``; yields what ``training.train.run`` takes as ``on_progress``.

    It shows the share of features computed and, from the first step on, the share of steps.
    """
    columns = (
        TextColumn("[bold]{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[now]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(name, total=1.0, now="starting the workers")

        def show(said: Sequence[str], metrics: Mapping[str, float]) -> None:
            for line in said:
                progress.console.print(line, highlight=False, markup=False, soft_wrap=True)
            if "progress" in metrics:
                now = f"loss {metrics['loss']:.4f} · {metrics['samples_per_second']:.0f} samples/s"
                progress.update(task, completed=metrics["progress"], now=now)
            elif "features_done" in metrics:
                share = metrics["features_done"]
                progress.update(task, completed=share, now="computing features")

        yield show


def _name(run_id: str) -> str:
    return f"dim-progress-{run_id}"
