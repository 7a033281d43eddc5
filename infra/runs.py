"""``dim runs``: what was trained and made, in the terminal; two runs beside one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dim.errors import InputError
from infra.cost import TOTAL
from infra.registry import Registry
from infra.tracking import TrackingError, call, open_client

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

_SHOWN = ("loss", "validation_loss", "validation_exact", "validation_strict", "exact/blueprint",
          "exact/self", "exact/instruction", "samples_per_second",
          "kept", "rejected", "failed", "cost/usd", TOTAL)  # fmt: skip
_MOST = 10_000


def list_runs(client: MlflowClient, uri: str, experiment: str | None, limit: int) -> list[Run]:
    """The latest runs, of one experiment or of all.

    Raises:
        InputError: there is no such experiment.
        TrackingError: the store cannot be read.
    """
    experiments = call(uri, "be read", client.search_experiments)
    known = {each.experiment_id: each.name for each in experiments}
    chosen = [key for key, name in known.items() if experiment in (None, name)]
    if not chosen:
        names = ", ".join(sorted(known.values())) or "none"
        raise InputError(f"{uri} has no experiment {experiment!r} (there are: {names})")
    found: list[Run] = call(
        uri,
        "be read",
        lambda: list(client.search_runs(chosen, max_results=limit, order_by=["start_time DESC"])),
    )
    return found


def list_table(runs: Sequence[Run], versions: dict[str, str]) -> Table:
    """A row a run: what it is, how it stands, the numbers that it has.

    Args:
        runs: of MLflow.
        versions: what was registered of them, by run.
    """
    shown = [name for name in _SHOWN if any(name in run.data.metrics for run in runs)]
    table = Table("run", "what", "state", "begun", "minutes", *shown, "registered")
    for run in runs:
        numbers = (run.data.metrics.get(name) for name in shown)
        table.add_row(
            run.info.run_id[:8],
            run.info.run_name or "",
            run.info.status.lower(),
            datetime.fromtimestamp(run.info.start_time / 1000).strftime("%Y-%m-%d %H:%M"),
            _minutes(run),
            *("" if number is None else f"{number:.4g}" for number in numbers),
            versions.get(run.info.run_id, ""),
        )
    return table


def compare_table(runs: Sequence[Run]) -> Table:
    """The settings in which runs differ, and all of their numbers: a column a run."""
    table = Table("", *(f"{run.info.run_id[:8]} {run.info.run_name or ''}" for run in runs))
    settings = sorted({name for run in runs for name in run.data.params})
    for name in settings:
        values = [run.data.params.get(name, "") for run in runs]
        if len(set(values)) > 1:
            table.add_row(name, *values)
    table.add_section()
    for name in sorted({name for run in runs for name in run.data.metrics}):
        numbers = (run.data.metrics.get(name) for run in runs)
        table.add_row(name, *("" if number is None else f"{number:.5g}" for number in numbers))
    return table


def find_runs(runs: Sequence[Run], wanted: Sequence[str]) -> list[Run]:
    """The runs that ids, or the beginnings of ids, name.

    Raises:
        InputError: one names none, or several.
    """
    chosen = []
    for start in wanted:
        found = [run for run in runs if run.info.run_id.startswith(start)]
        if len(found) != 1:
            said = "several runs begin" if found else "no run begins"
            raise InputError(f"{said} with {start!r}")
        chosen += found
    return chosen


def main(
    runs: Annotated[
        list[str] | None, typer.Argument(help="Ids, or how they begin: compare these runs.")
    ] = None,
    uri: Annotated[
        str | None, typer.Option(help="The MLflow store; default: MLFLOW_TRACKING_URI.")
    ] = None,
    experiment: Annotated[str | None, typer.Option(help="Only of this experiment.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="As many at most, the latest.")] = 20,
) -> None:
    """List the runs of an MLflow store, or compare some: differing settings, and all numbers."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError("which MLflow? Give --uri, or set MLFLOW_TRACKING_URI")
    client, console = open_client(uri), Console()
    found = list_runs(client, uri, experiment, _MOST if runs else limit)
    if runs:
        console.print(compare_table(find_runs(found, runs)))
    elif found:
        console.print(list_table(found, _registered(Registry(uri))))
    else:
        console.print("no run yet")


def _registered(registry: Registry) -> dict[str, str]:
    """What was registered, by run: ``dim/3 @edit1 @champion``."""
    versions = (each for name in registry.names() for each in registry.versions(name))
    return {
        each.run_id: " ".join((f"{each.name}/{each.version}", *(f"@{a}" for a in each.aliases)))
        for each in versions
    }


def _minutes(run: Run) -> str:
    end = run.info.end_time
    return f"{(end - run.info.start_time) / 60_000:.1f}" if end else ""


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
