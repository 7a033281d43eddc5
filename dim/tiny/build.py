"""``dim tiny build``: pretrain the shipped tiny models on the tabletop world, part by part.

The parts build on each other: the painter learns from conditions of the understanding model and
latents of the autoencoder. Weights are stored as float16 with the log and the command beside them.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from safetensors.torch import save_file

from dim.config import dump_config, load_config
from dim.errors import InputError
from dim.model import parts
from dim.model.checkpoint.folder import UNDERSTANDING, write_understanding
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig, UnderstandingConfig
from dim.tiny.autoencoder import reconstruction_accuracy, train_autoencoder
from dim.tiny.config import TinyBuildConfig
from dim.tiny.painter import painting_accuracy, train_painter
from dim.tiny.schedule import Progress
from dim.tiny.understanding import design_accuracy, train_binding, train_understanding

_PACKAGES = ("torch", "transformers", "diffusers", "numpy")


def build_autoencoder(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train and save the DC-AE; returns its held-out accuracy."""
    network = train_autoencoder(config, model.autoencoder, out / "logs", progress)
    network.to(torch.float16).save_pretrained(out / "autoencoder")
    return reconstruction_accuracy(config, network.float())


def build_understanding(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train and save the Qwen2.5-VL with its tokenizer; returns its held-out accuracies."""
    section = model.understanding
    conditioner = train_understanding(config, section, out / "logs", progress)
    return _finish_understanding(config, section, conditioner, out)


def build_binding(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Go on with the Qwen2.5-VL in ``out``, binding words; returns its held-out accuracies."""
    conditioner = _pretrained(model, out)
    train_binding(config, conditioner, out / "logs", progress)
    return _finish_understanding(config, model.understanding, conditioner, out)


def build_painter(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train and save painter and connector on the two parts in ``out``; returns accuracies."""
    conditioner = _pretrained(model, out)
    coded = model.autoencoder.model_copy(update={"weights": str(out / "autoencoder")})
    autoencoder = parts.autoencoder(coded, dtype=torch.float32)
    trained = train_painter(config, model, conditioner, autoencoder, out / "logs", progress)
    accuracy = painting_accuracy(config, conditioner, autoencoder, trained)
    folder = out / "painter"
    trained.painter.half().network.save_pretrained(folder)
    table = {parts.NULL_CONDITION: trained.painter.null_condition.detach()}
    save_file(table, folder / parts.NULL_CONDITION_FILE)
    save_file(trained.connector.half().state_dict(), folder / "connector.safetensors")
    return accuracy


def _pretrained(model: ModelConfig, out: Path) -> Conditioner:
    """The understanding model that an earlier part left in ``out``."""
    section = model.understanding.model_copy(update={"weights": str(out / UNDERSTANDING)})
    return parts.conditioner(section, dtype=torch.float32)


def _finish_understanding(
    config: TinyBuildConfig, model: UnderstandingConfig, conditioner: Conditioner, out: Path
) -> dict[str, float]:
    """Save the understanding model and its settings in ``out``; returns its accuracies."""
    conditioner.model.half()
    write_understanding(out / UNDERSTANDING, conditioner)
    (out / f"{UNDERSTANDING}.json").write_text(settings_of(model), encoding="utf-8")
    conditioner.model.float()
    return design_accuracy(config, conditioner, model.design_max_new_tokens)


def settings_of(model: UnderstandingConfig) -> str:
    """``model`` as JSON without what its folder says: with these settings its weights are used."""
    settings = model.model_dump(mode="json", exclude={"weights", "architecture"})
    return json.dumps(settings, indent=2) + "\n"


Builder = Callable[[TinyBuildConfig, ModelConfig, Path, Progress], dict[str, float]]
PARTS: dict[str, Builder] = {
    "autoencoder": build_autoencoder,
    "understanding": build_understanding,
    "binding": build_binding,
    "painter": build_painter,
}


def build(
    config: TinyBuildConfig, model: ModelConfig, out: Path, names: list[str], progress: Progress
) -> dict[str, Any]:
    """Build the parts called ``names`` into ``out`` and write what came of each to its report.

    Raises:
        InputError: a name is no part.
    """
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise InputError(f"unknown part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    (out / "logs").mkdir(parents=True, exist_ok=True)
    reports = {}
    for name in names:
        start = time.monotonic()
        accuracy = PARTS[name](config, model, out, progress)
        reports[name] = {
            "command": f"dim tiny build --part {name}",
            "held_out": accuracy,
            "minutes": round((time.monotonic() - start) / 60, 1),
            "config": dump_config(config),
            "versions": {package: version(package) for package in _PACKAGES},
            "machine": platform.machine(),
        }
        text = json.dumps(reports[name], indent=2, sort_keys=True) + "\n"
        (out / "logs" / f"{name}.report.json").write_text(text, encoding="utf-8")
    return reports


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides of the build configuration")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the weights")] = Path("dim/tiny/weights"),
    part: Annotated[
        list[str] | None, typer.Option(help="build this part only; may be repeated")
    ] = None,
    config: Annotated[Path, typer.Option(help="build configuration")] = Path(
        "configs/tiny-build.yaml"
    ),
    model: Annotated[Path, typer.Option(help="model file")] = Path("configs/tiny.yaml"),
) -> None:
    """Pretrain the tiny models on the tabletop world (hours on one core)."""
    console = Console()

    def show(name: str, step: int, steps: int, loss: float) -> None:
        console.print(f"{name} {step}/{steps} loss {loss:.4f}", highlight=False)

    reports = build(
        load_config(TinyBuildConfig, config, overrides or []),
        load_config(ModelConfig, model),
        out,
        part or list(PARTS),
        show,
    )
    for name, report in reports.items():
        console.print(name, report["held_out"], f"in {report['minutes']} minutes")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
