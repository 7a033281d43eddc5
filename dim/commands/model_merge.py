"""``dim model merge DIR --lora PATH[:WEIGHT] --out DIR``: adapters merged into a DIM folder."""

from __future__ import annotations

from pathlib import Path

import typer


def main(
    model: Path = typer.Argument(..., metavar="DIR", help="The DIM folder."),
    lora: list[str] = typer.Option(
        ..., metavar="PATH[:WEIGHT]", help="An adapter, as fine-tuning makes; may be repeated."
    ),
    out: Path = typer.Option(..., "--out", "-o", help="The DIM folder to write."),
    max_shard_gb: float = typer.Option(10.0, min=1e-6, help="Write a larger painter in shards."),
) -> None:
    """Write a DIM folder with LoRA adapters in its weights, a tensor at a time."""
    from dim.model.lora.merge import merge_folder

    merge_folder(model, lora, out, max_shard_bytes=int(max_shard_gb * 10**9))
    typer.echo(f"model: {out}", err=True)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
