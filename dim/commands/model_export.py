"""``dim model export DIR``: a DIM folder in the published layout."""

from __future__ import annotations

from pathlib import Path

import typer


def main(
    model: Path = typer.Argument(..., metavar="DIR", help="The DIM folder."),
    out: Path = typer.Option(
        ..., "--out", "-o", help="A file that ends in .safetensors, or a new or empty folder."
    ),
    autoencoder: bool | None = typer.Option(
        None, help="Whether to write the DC-AE too. If the imported checkpoint had it."
    ),
    understanding: bool | None = typer.Option(
        None, help="Whether to write the Qwen2.5-VL too. If it came with the imported checkpoint."
    ),
    max_shard_gb: float = typer.Option(
        10.0, min=1e-6, help="Write a larger checkpoint in shards, if OUT is a folder."
    ),
) -> None:
    """Write a DIM folder under the published checkpoints' names, a tensor at a time."""
    from dim.model.checkpoint.exporter import export_checkpoint

    files = export_checkpoint(
        model,
        out,
        autoencoder=autoencoder,
        understanding=understanding,
        max_shard_bytes=int(max_shard_gb * 10**9),
    )
    for file in files:
        typer.echo(str(file))


if __name__ == "__main__":
    from dim.cli import run

    run(main)
