"""What a command says at its end of the output that it made."""

from __future__ import annotations

from rich.console import Console

from dim.errors import DimError
from pipelines.outputs.manifest import Manifest


def summary(out: str, manifest: Manifest) -> None:
    """Say what became of the records.

    Raises:
        DimError: nothing was kept because everything failed.
    """
    counts = manifest.counts
    console = Console(soft_wrap=True, highlight=False)
    console.print(counts.in_words())
    for reason, rows in sorted(counts.by_reason.items(), key=lambda item: -item[1]):
        console.print(f"  {rows:,} {reason}")
    if cost := manifest.cost:
        console.print(
            f"cost: ${cost['usd']:,.2f} for {cost['requests']:,.0f} answers, "
            f"{cost['input_tokens']:,.0f} tokens in and {cost['output_tokens']:,.0f} out",
            markup=False,
        )
    console.print(f"output: {out}", markup=False)
    if counts.failed and not counts.kept:
        raise DimError(
            f"no record was kept and {counts.failed:,} failed; {out}/failed says why, and "
            "--retry-failed tries again"
        )
