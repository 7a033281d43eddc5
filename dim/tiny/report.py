"""``dim tiny report``: how good the shipped tiny models are, measured anew on held-out scenes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from dim.config import load_config
from dim.model import build
from dim.model.config import ModelConfig
from dim.tiny.autoencoder import reconstruction_accuracy
from dim.tiny.config import TinyBuildConfig
from dim.tiny.painter import painting_accuracy
from dim.tiny.understanding import design_accuracy


def measure(config: TinyBuildConfig, model: ModelConfig) -> dict[str, dict[str, float]]:
    """Accuracies from 0 to 1 of the parts that ``model`` names, on ``config.evaluate`` scenes.

    Raises:
        CheckpointError: weights are missing or damaged.
    """
    torch.set_num_threads(1)
    painter = model.painter.model_copy(update={"source_latent": False})
    built = build(model.model_copy(update={"painter": painter}))
    limit = model.understanding.design_max_new_tokens
    return {
        "autoencoder": reconstruction_accuracy(config, built.autoencoder.network),
        "understanding": design_accuracy(config, built.conditioner, limit),
        "painter": painting_accuracy(config, built),
    }


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides of the build configuration")
    ] = None,
    config: Annotated[Path, typer.Option(help="build configuration")] = Path(
        "configs/tiny-build.yaml"
    ),
    model: Annotated[Path, typer.Option(help="model file")] = Path("configs/tiny.yaml"),
) -> None:
    """Measure the tiny models on scenes that their training never saw."""
    settings = load_config(TinyBuildConfig, config, overrides or [])
    shown = Table(title=f"{settings.evaluate} held-out scenes")
    shown.add_column("part")
    shown.add_column("right")
    shown.add_column("share", justify="right")
    for part, values in measure(settings, load_config(ModelConfig, model)).items():
        for name, share in values.items():
            shown.add_row(part, name, f"{share:.1%}")
    Console().print(shown)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
