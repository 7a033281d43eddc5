"""``dim tiny build``: pretrain the shipped tiny models on the tabletop world, part by part.

The parts build on each other: the painter learns from conditions of the understanding model and
latents of the autoencoder. Those two have trainings of their own (:mod:`dim.tiny.build`); connector
and painter are trained as everybody's are, by a text-to-image stage on what the data jobs make.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console

from dim import model as dim_model
from dim.config import CONFIGS, dump_config, load_config
from dim.errors import InputError
from dim.model.config import ModelConfig
from dim.tiny import build as own
from dim.tiny.build import Builder
from dim.tiny.config import TinyBuildConfig
from dim.tiny.painter import painting_accuracy, save_painter
from dim.tiny.schedule import Progress
from infra.tracking import open_client
from pipelines.cluster import connect
from pipelines.job import TrackingConfig
from pipelines.readers.tabletop import TabletopConfig
from training import train
from training.progress import OnProgress
from training.record import read_record
from training.stage import StageConfig
from training.train import StageResult
from workflows import tabletop

_PACKAGES = ("torch", "transformers", "diffusers", "numpy", "ray")
_LINES = 100  # of the painter's log and of what is said of its training


def build_painter(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train painter and connector on the two parts in ``out``; returns their held-out accuracies.

    Data, checkpoints and the run's record lie in ``config.painter.work``, from where an interrupted
    build goes on.
    """
    work = config.painter.work.resolve()
    uri = f"sqlite:///{work / 'mlflow.db'}"
    connect()
    data = _captioned_scenes(config, work, TrackingConfig(uri=uri, experiment="dim-data"))
    stage = _stage(config, _random_painter(model, out, work / "painter.yaml"), data, work, uri)
    made = train.run(stage, on_progress=_teller(progress, stage))
    _write_log(made, uri, out / "logs" / "painter.jsonl")
    trained = dim_model.load(made.model_dir)
    accuracy = painting_accuracy(config, trained)
    save_painter(trained, out / "painter")
    return accuracy


def build_editor(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Keep painter and connector of a demo's last stage; returns the accuracies it was measured at.

    Raises:
        InputError: no demo has finished there.
    """
    found = config.editor.model
    record = read_record(str(found.parent))
    if record is None or not record.finished:
        raise InputError(f"{found} was trained by no finished stage: run `dim demo` first")
    save_painter(dim_model.load(found), out / "editor")
    return {name: record.metrics[f"validation_{name}"] for name in ("exact", "strict")}


PARTS: dict[str, Builder] = {
    "autoencoder": own.build_autoencoder,
    "understanding": own.build_understanding,
    "binding": own.build_binding,
    "painter": build_painter,
    "editor": build_editor,
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


def _captioned_scenes(config: TinyBuildConfig, work: Path, tracking: TrackingConfig) -> str:
    """DIM-T2I of as many scenes as the painter is to see."""
    world = TabletopConfig(size=config.resolution, objects=config.objects, seed=config.seed)
    raw, data = str(work / "raw"), str(work / "t2i")
    tabletop.raw_images(world, raw, config.painter.scenes, tracking, seed=config.seed)
    tabletop.captioned(world, raw, data, tracking)
    return data


def _random_painter(model: ModelConfig, out: Path, file: Path) -> Path:
    """The model YAML that training starts from: the parts in ``out``, the others random."""
    weights = {
        "understanding": {"weights": str((out / "understanding").resolve())},
        "autoencoder": {"weights": str((out / "autoencoder").resolve())},
        "connector": {"weights": None},
        "painter": {"weights": None, "source_latent": False},
    }
    values = dump_config(model)
    for part, changes in weights.items():
        values[part] |= changes
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return file


def _stage(config: TinyBuildConfig, init: Path, data: str, work: Path, uri: str) -> StageConfig:
    overrides = {
        "init": str(init),
        "data": [data],
        "out": str(work / "stage"),
        "seed": config.seed,
        "tracking.uri": uri,
        "registry": None,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in overrides.items()]
    part = config.painter
    return load_config(StageConfig, CONFIGS / part.stage, [*given, *part.stage_overrides])


def _teller(progress: Progress, stage: StageConfig) -> OnProgress:
    """Passes on what the stage says of itself, a hundred times in all."""
    steps = stage.steps or 0
    told = -steps

    def tell(lines: Sequence[str], metrics: Mapping[str, float]) -> None:
        nonlocal told
        step = round(metrics.get("progress", 0) * steps)
        if "loss" in metrics and step - told >= steps / _LINES:
            told = step
            progress("painter", step, steps, metrics["loss"])

    return tell


def _write_log(made: StageResult, uri: str, file: Path) -> None:
    """The run's losses and learning rates, as the other parts' logs have them."""
    client = open_client(uri)
    loss, rate = (
        {point.step: point.value for point in client.get_metric_history(made.mlflow_run_id, name)}
        for name in ("loss", "learning_rate")
    )
    lines = [
        json.dumps(
            {
                "step": step,
                "loss": round(loss[step], 5),
                "learning_rate": float(f"{rate[step]:.3g}"),
            }
        )
        for step in sorted(loss)
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value overrides of the build configuration")
    ] = None,
    out: Annotated[Path, typer.Option(help="folder of the weights")] = Path("dim/tiny/weights"),
    part: Annotated[
        list[str] | None,
        typer.Option(
            help=f"build this part only, of {', '.join(PARTS)}; may be repeated. The editor is "
            "what `dim demo` has trained, and is built by name only."
        ),
    ] = None,
    config: Annotated[Path, typer.Option(help="build configuration")] = CONFIGS / "tiny-build.yaml",
    model: Annotated[Path, typer.Option(help="model file")] = CONFIGS / "tiny.yaml",
) -> None:
    """Pretrain the tiny models on the tabletop world (hours on one core)."""
    console = Console()

    def show(name: str, step: int, steps: int, loss: float) -> None:
        console.print(f"{name} {step}/{steps} loss {loss:.4f}", highlight=False)

    reports = build(
        load_config(TinyBuildConfig, config, overrides or []),
        load_config(ModelConfig, model),
        out,
        part or [name for name in PARTS if name != "editor"],
        show,
    )
    for name, report in reports.items():
        console.print(name, report["held_out"], f"in {report['minutes']} minutes")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
