"""A progress bar for a stage, fed by the metrics that reach MLflow."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def progress_bar(
    console: Console, name: str
) -> Iterator[Callable[[Sequence[str], Mapping[str, float]], None]]:
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
