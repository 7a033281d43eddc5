"""What the command lines of the data jobs have in common."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dim.errors import DimError
from pipelines.outputs.manifest import Manifest

Out = Annotated[str, typer.Option(help="Output folder: a local path, file:// or s3://bucket/key.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Further settings: key.sub=value.", show_default=False)
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with settings.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Make a finished output again if records failed.")
]


def settings(**values: Any) -> list[str]:
    """The options that were given, as overrides; JSON is YAML, so any text survives."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]


def summary(out: str, manifest: Manifest) -> None:
    """Say what became of the records.

    Raises:
        DimError: nothing was kept because everything failed.
    """
    counts = manifest.counts
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"{counts.input:,} records: {counts.kept:,} kept, {counts.rejected:,} rejected, "
        f"{counts.failed:,} failed"
    )
    for reason, rows in sorted(counts.by_reason.items(), key=lambda item: -item[1]):
        console.print(f"  {rows:,} {reason}")
    if manifest.cost:
        console.print(f"cost: {_in_words(manifest.cost)}", markup=False)
    console.print(f"output: {out}", markup=False)
    if counts.failed and not counts.kept:
        raise DimError(
            f"no record was kept and {counts.failed:,} failed; {out}/failed says why, and "
            "--retry-failed tries again"
        )


def _in_words(cost: Mapping[str, float]) -> str:
    return (
        f"${cost['usd']:,.2f} for {cost['requests']:,.0f} answers, {cost['input_tokens']:,.0f} "
        f"tokens in and {cost['output_tokens']:,.0f} out"
    )
