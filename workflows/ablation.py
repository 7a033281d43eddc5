"""``dim experiment ablation``: the paper's claim in miniature, on edits that can be checked.

The same painter is trained three ways for the same number of steps: on the bare instruction, on an
oracle's blueprint, and on a designer's that is wrong now and then. Each is then given held-out
edits in the words that it was trained on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
from pydantic import Field, NonNegativeInt, PositiveInt
from rich.console import Console
from rich.table import Table

from dim.config import CONFIGS, load_config
from dim.records import TextName
from infra.tracking import Tracking, open_client
from pipelines import evaluate
from pipelines.cluster import connect
from pipelines.command import Overrides
from pipelines.evaluate import Evaluation, Share
from pipelines.job import TrackingConfig
from pipelines.readers.tabletop import TabletopConfig
from pipelines.stages.paint import BLUEPRINT, INSTRUCTION
from training import train
from training.progress import progress_bar
from training.stage import StageConfig
from training.train import StageResult
from workflows import tabletop

_CURVES = ("loss", "validation_exact")


class AblationConfig(TabletopConfig):
    """What is trained, on what, and how often."""

    out: Path = Path("runs/ablation")
    pairs: PositiveInt
    """Edit pairs to train on."""
    held_out: PositiveInt
    """Edits to measure on, of scenes that training never sees."""
    stage: str
    """A stage file in configs/: model, optimizer, batch."""
    stage_overrides: tuple[str, ...] = ()
    """key=value settings on top of it."""
    steps: PositiveInt
    """Of every run."""
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    """A run of each arm for every one; they draw noise and order, the data stay."""
    noise: float = Field(0.3, ge=0, le=1)
    """Share of the noisy designer's plans that are wrong."""


@dataclass(frozen=True)
class Arm:
    """One way to tell the painter what to do.

    Attributes:
        name: as the table calls it.
        designer: who writes the blueprints of its data, for training and for measuring.
        text: the column that it is trained on, and told.
    """

    name: str
    designer: str
    text: TextName

    @property
    def key(self) -> str:
        """The same for folders and metrics."""
        return f"{self.text}-{self.designer.replace(':', '-')}"


def arms(noise: float) -> tuple[Arm, ...]:
    """The three that are compared."""
    return (
        Arm("instruction", "oracle", INSTRUCTION),  # type: ignore[arg-type]
        Arm("oracle blueprint", "oracle", BLUEPRINT),  # type: ignore[arg-type]
        Arm(f"noisy blueprint ({noise:.0%} wrong)", f"noisy:{noise:g}", BLUEPRINT),  # type: ignore[arg-type]
    )


@dataclass(frozen=True)
class Result:
    """An arm with what came out over all seeds, and how its runs went.

    Attributes:
        arm: which.
        evaluation: every painted edit of every seed.
        curves: by metric, for each seed its (step, value) points.
    """

    arm: Arm
    evaluation: Evaluation
    curves: Mapping[str, Sequence[Sequence[tuple[int, float]]]]

    def share(self, **chosen: Any) -> Share:
        """Exact edits among those that are chosen, over all seeds."""
        return self.evaluation.share(self.arm.text, **chosen)


def run(config: AblationConfig, console: Console) -> list[Result]:
    """Train and measure every arm with every seed, and leave table and curves in ``config.out``.

    What an earlier, interrupted call finished in the same folder is not done again.

    Raises:
        DimError: a step could not be done; the message says which and why.
    """
    out = config.out.resolve()
    uri = f"sqlite:///{out / 'mlflow.db'}"
    owns_ray = connect()
    try:
        results = [
            _measure(config, arm, _make_data(config, out, uri, arm.designer), uri, console)
            for arm in arms(config.noise)
        ]
    finally:
        if owns_ray:
            ray.shutdown()
    (out / "table.md").write_text(as_markdown(results), encoding="utf-8")
    (out / "table.json").write_text(json.dumps(as_numbers(results), indent=2), encoding="utf-8")
    draw_curves(results, out / "curves.png")
    with Tracking(uri, "dim-ablation").run("ablation", config.model_dump(mode="json")) as tracked:
        tracked.log_metrics(
            {
                f"exact/{result.arm.key}/{name}": share.accuracy
                for name, shares in rows(results)
                for result, share in zip(results, shares, strict=True)
            }
        )
    return results


def rows(results: Sequence[Result]) -> list[tuple[str, list[Share]]]:
    """The table: a name, and a share for each arm."""
    groups: list[tuple[str, dict[str, Any]]] = [
        ("all", {}),
        ("direct", {"referential": False}),
        ("referential", {"referential": True}),
        *((kind, {"kind": kind}) for kind in results[0].evaluation.kinds),
    ]
    return [(name, [result.share(**chosen) for result in results]) for name, chosen in groups]


def as_numbers(results: Sequence[Result]) -> dict[str, dict[str, dict[str, float]]]:
    """By row and arm: ``exact`` and ``strict`` from 0 to 1, ``low`` and ``high``, ``count``."""
    return {
        name: {
            result.arm.name: {
                "exact": share.accuracy,
                "strict": share.strict_accuracy,
                **dict(zip(("low", "high"), share.interval, strict=True)),
                "count": share.count,
            }
            for result, share in zip(results, shares, strict=True)
        }
        for name, shares in rows(results)
    }


def as_markdown(results: Sequence[Result]) -> str:
    """The table for a page."""
    lines = [
        "| exact (95 % interval), strictly | " + " | ".join(r.arm.name for r in results) + " |",
        "| --- |" + " --- |" * len(results),
    ]
    for name, shares in rows(results):
        lines.append(f"| {name} | " + " | ".join(map(_in_words, shares)) + " |")
    return "\n".join(lines) + "\n"


def as_table(results: Sequence[Result]) -> Table:
    """The same for a terminal."""
    table = Table("exact (95 % interval), strictly", *(result.arm.name for result in results))
    for name, shares in rows(results):
        table.add_row(name, *map(_in_words, shares))
    return table


def draw_curves(results: Sequence[Result], file: Path) -> None:
    """Loss and exact validation edits by step, a colour an arm and a line a seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, metric in zip(figure.subplots(1, len(_CURVES)), _CURVES, strict=True):
        for number, result in enumerate(results):
            for place, points in enumerate(result.curves[metric]):
                label = None if place else result.arm.name
                axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, alpha=0.7)
        axes.set_xlabel("step")
        axes.set_title(metric.replace("_", " "))
        axes.legend()
    figure.savefig(file, dpi=120)


def _make_data(config: AblationConfig, out: Path, uri: str, designer: str) -> tuple[str, str]:
    """DIM-Edit by one designer: to train on, and held out."""
    tracking = TrackingConfig(uri=uri, experiment="dim-data")
    made = []
    for place, (name, count) in enumerate((("train", config.pairs), ("held-out", config.held_out))):
        raw = str(out / "data" / f"raw-{name}")
        tabletop.raw_pairs(config, raw, count, tracking, seed=config.seed + place)
        made.append(str(out / "data" / f"{name}-{designer.replace(':', '-')}"))
        tabletop.designed(config, raw, made[-1], tracking, designer=designer)
    return made[0], made[1]


def _measure(
    config: AblationConfig, arm: Arm, data: tuple[str, str], uri: str, console: Console
) -> Result:
    """Train an arm with every seed, and paint the held-out edits with each model."""
    painted: list[pa.Table] = []
    curves: dict[str, list[list[tuple[int, float]]]] = {name: [] for name in _CURVES}
    for seed in config.seeds:
        stage = stage_config(config, arm, data, uri, seed)
        with progress_bar(console, f"{arm.name}, seed {seed}") as on_progress:
            made = train.run(stage, on_progress=on_progress)
        with console.status(f"{arm.name}, seed {seed}: held-out edits"):
            painted.append(_paint(made, arm, data[1]))
        for name in _CURVES:
            curves[name].append(_points(made, uri, name))
    return Result(arm, Evaluation(pa.concat_tables(painted)), curves)


def _paint(made: StageResult, arm: Arm, held_out: str) -> pa.Table:
    """The held-out edits by a model, kept beside it."""
    file = Path(made.model_dir).with_name("held-out.parquet")
    if not file.is_file():
        settings = evaluate.EvaluateConfig(model=made.model_dir, data=held_out, ways=(arm.text,))
        pq.write_table(evaluate.run(settings).painted, file.with_suffix(".part"))
        file.with_suffix(".part").rename(file)
    return pq.read_table(file)


def stage_config(
    config: AblationConfig, arm: Arm, data: tuple[str, str], uri: str, seed: int
) -> StageConfig:
    """The stage file with an arm's text and data."""
    place = config.out.resolve() / "training" / f"{arm.key}-{seed}"
    overrides = [
        f"init={json.dumps(str(CONFIGS / 'tiny.yaml'))}",
        f"data={json.dumps([data[0]])}",
        f"text_mix={json.dumps({arm.text: 1})}",
        f"out={json.dumps(str(place))}",
        f"steps={config.steps}",
        f"seed={seed}",
        f"tracking.uri={json.dumps(uri)}",
        "registry=null",
        f"validation.data={json.dumps([data[1]])}",
        f"validation.every={max(1, config.steps // 8)}",
    ]
    return load_config(StageConfig, CONFIGS / config.stage, [*overrides, *config.stage_overrides])


def _points(made: StageResult, uri: str, metric: str) -> list[tuple[int, float]]:
    history = open_client(uri).get_metric_history(made.mlflow_run_id, metric)
    return sorted({point.step: point.value for point in history}.items())


def _in_words(share: Share) -> str:
    low, high = (f"{100 * bound:.0f}" for bound in share.interval)
    strictly = f"{share.strict_accuracy:.0%}"
    return f"{share.accuracy:.0%} ({low}-{high}) of {share.count}, {strictly}"


def main(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="Settings of the experiment.")] = CONFIGS
    / "ablation.yaml",
    out: Annotated[Path | None, typer.Option(help="Folder for everything it makes.")] = None,
) -> None:
    """Instruction, blueprint or noisy blueprint: what a painter makes of each in equal steps.

    Run again, it goes on where it was interrupted.
    """
    given = [] if out is None else [f"out={json.dumps(str(out))}"]
    chosen = load_config(AblationConfig, config, [*given, *(overrides or [])])
    console = Console()
    results = run(chosen, console)
    console.print(as_table(results))
    console.print(f"table.md, table.json, curves.png: {chosen.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
