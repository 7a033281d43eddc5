"""``dim model info DIR``: what a DIM folder holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dim.model.checkpoint.summary import Summary


def main(model: Path = typer.Argument(..., metavar="DIR", help="The DIM folder.")) -> None:
    """Show parts, sizes, stage and provenance of a DIM folder; no weights are read."""
    show(model)


def show(model: Path) -> None:
    """Print the tables of the DIM folder ``model``.

    Raises:
        CheckpointError: no such folder, not a DIM, incomplete, or a damaged file.
    """
    from dim.model.checkpoint.summary import summarise

    summary = summarise(model)
    console = Console()
    console.print(_parts(summary))
    facts = Table.grid(padding=(0, 2))
    for name, value in _facts(summary):
        facts.add_row(name, Text(value))
    console.print(facts)


def _parts(summary: Summary) -> Table:
    table = Table(title=Text(str(summary.path)))
    table.add_column("part")
    for heading in ("parameters", "types", "MB"):
        table.add_column(heading, justify="right")
    for part in summary.parts:
        table.add_row(
            part.name,
            f"{part.parameters:,}",
            ", ".join(part.dtypes),
            f"{part.nbytes / 1e6:,.1f}",
        )
    table.add_section()
    total = sum(part.parameters for part in summary.parts)
    size = sum(part.nbytes for part in summary.parts)
    table.add_row("all", f"{total:,}", "", f"{size / 1e6:,.1f}")
    return table


def _facts(summary: Summary) -> Iterator[tuple[str, str]]:
    description = summary.description
    yield "stage", summary.stage
    for name, size in summary.sizes.items():
        yield name, f"{size:,}"
    inside = description.holds_understanding
    yield "understanding model", "in the folder" if inside else description.understanding
    yield "written by", f"dim {description.version}"
    came = description.provenance
    if came is None:
        yield "provenance", "not an import"
        return
    yield "imported from", came.checkpoint
    yield "checkpoint", f"{came.task}, null table of {came.null_condition_tokens:,} rows"
    yield "taken", ", ".join(f"{prefix}*" for prefix in came.sections)
    if came.left_out:
        yield "left out", ", ".join(f"{prefix}*" for prefix in came.left_out)
    if came.task == "t2i" and summary.stage == "edit":
        yield "widened", "yes: the source latent's channels are not the checkpoint's"


if __name__ == "__main__":
    from dim.cli import run

    run(main)
