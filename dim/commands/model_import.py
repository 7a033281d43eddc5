"""``dim model import PATH``: a published checkpoint as a DIM folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

if TYPE_CHECKING:
    from dim.model.config import ModelConfig

Task = Literal["edit", "t2i"]


def main(
    path: Path = typer.Argument(..., help="model.safetensors, or the folder of it or its shards."),
    out: Path = typer.Option(..., "--out", "-o", help="The DIM folder to write."),
    config: Path | None = typer.Option(
        None,
        help="What tensors do not show (image size, sampling, the frozen parts): a model YAML, or "
        "a DIM folder. The published models' by default.",
    ),
    understanding: str | None = typer.Option(
        None, help="Folder or hub id of the Qwen2.5-VL, for its tokenizer and, by reference, all."
    ),
    autoencoder: str | None = typer.Option(
        None, help="Folder or hub id of the DC-AE: its configuration, and weights if PATH has none."
    ),
    copy_understanding: bool | None = typer.Option(
        None,
        "--copy-understanding/--refer-understanding",
        help="Whether the Qwen2.5-VL goes into the folder. Copied if PATH has it.",
    ),
    task: Task | None = typer.Option(None, help="Refuse a checkpoint of the other task."),
    widen: bool = typer.Option(
        False, "--widen", help="Make an edit painter of a text-to-image checkpoint."
    ),
    null_condition_tokens: int | None = typer.Option(
        None, min=1, help="Give the null table so many rows: cut it, or add random ones."
    ),
    attention_head_dim: int | None = typer.Option(
        None, min=1, help="Features of a self-attention head, which no shape shows; 32 published."
    ),
    cross_attention_head_dim: int | None = typer.Option(
        None, min=1, help="The same for cross-attention; 112 published."
    ),
    max_shard_gb: float = typer.Option(10.0, min=1e-6, help="Write larger parts in shards."),
) -> None:
    """Turn a published checkpoint into a DIM folder, a tensor at a time.

    Every tensor is checked first; all that is wrong is said at once.
    """
    from dim.commands.model_info import show
    from dim.model.checkpoint.importer import Changes, import_checkpoint

    import_checkpoint(
        path,
        out,
        config=_configured(config, understanding, autoencoder),
        task=task,
        changes=Changes(widen, null_condition_tokens),
        copy_understanding=copy_understanding,
        attention_head_dim=attention_head_dim,
        cross_attention_head_dim=cross_attention_head_dim,
        max_shard_bytes=int(max_shard_gb * 10**9),
    )
    show(out)


def _configured(
    path: Path | None, understanding: str | None, autoencoder: str | None
) -> ModelConfig:
    """The configuration at ``path`` with other places of the frozen parts."""
    from dim.config import load_config
    from dim.model.checkpoint import folder
    from dim.model.checkpoint.importer import PUBLISHED
    from dim.model.config import ModelConfig

    if path is None:
        config = PUBLISHED
    elif path.is_dir():
        config = folder.located(path, folder.read_description(path))
    else:
        config = load_config(ModelConfig, path)
    places = {"understanding": understanding, "autoencoder": autoencoder}
    sections = {
        name: getattr(config, name).model_copy(update={"weights": weights, "dtype": None})
        for name, weights in places.items()
        if weights is not None
    }
    return config.model_copy(update=sections)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
