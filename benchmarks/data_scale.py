"""Costs of the data jobs that must not grow with the data, on synthetic input, each with its bar.

    python -m benchmarks.data_scale                  # all of them
    python -m benchmarks.data_scale --only answers   # those whose name begins so

Gathers the rows (``ROWS``) of all modules ``benchmarks/data_scale_*.py``. Leaves with status 1 when
a bar is missed.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

import benchmarks
from benchmarks.row import Row


def rows() -> Iterator[Row]:
    """The rows of all modules, by name of the module."""
    for found in sorted(pkgutil.iter_modules(benchmarks.__path__), key=lambda each: each.name):
        if found.name.startswith("data_scale_"):
            yield from import_module(f"benchmarks.{found.name}").ROWS


def main(
    only: Annotated[str, typer.Option(help="Measure rows whose names begin so.")] = "",
) -> None:
    """Measure, and hold each figure against its bar."""
    chosen = [row for row in rows() if row.name.startswith(only)]
    if not chosen:
        raise typer.BadParameter(f"there is no row whose name begins with {only!r}")
    table, missed = Table("row", "", "before", "now", "bar"), 0
    for row in chosen:
        figure = row.measure()
        missed += not row.holds(figure)
        before = "-" if row.before is None else f"{row.before:,.4g}"
        sign = "≥" if row.better == "more" else "≤"
        table.add_row(row.name, row.what, before, f"{figure:,.4g}", f"{sign} {row.bar:,.4g}")
    Console(width=140).print(table)
    if missed:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
