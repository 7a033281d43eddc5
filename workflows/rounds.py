"""``dim experiment rounds``: what it brings to look at what was painted, and what it costs.

A trained painter is given held-out edits of the tabletop with the oracle's blueprints. The oracle
then looks at each image and has it painted again until it is exact or the rounds are over. It looks
with the very checker that counts in the end, so this is the most that any reviewer could get out of
this painter; and it writes no other plan, so that each round is another draw of the noise.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image
from pydantic import Field, PositiveInt
from rich.console import Console
from rich.progress import track
from rich.table import Table

from dim import model, tabletop
from dim.config import CONFIGS, load_config
from dim.designers.tabletop import TabletopOracle
from dim.reflection import Candidate, Reflection, Wanted, reflect
from infra.models import on_this_machine
from pipelines.command import Overrides
from pipelines.evaluate import Share
from pipelines.readers.tabletop import TabletopConfig

_SEEDS_AN_EDIT = 1000
Paint = Callable[[tabletop.Edit, Sequence[Wanted]], Sequence[Image.Image]]
"""One image of an edit for each that is wanted."""


class RoundsConfig(TabletopConfig):
    """Which painter, and how often it is looked at."""

    model: str
    """Folder of a DIM that follows blueprints of the tabletop."""
    out: Path = Path("runs/rounds")
    edits: PositiveInt
    """To paint; training has not seen them if ``seed`` is another one than its data's."""
    rounds: int = Field(4, ge=1, le=4)
    """At most; all from 1 on are told of."""
    best_of: int = Field(4, ge=1, le=10)
    """Images a round; likewise."""
    steps: PositiveInt | None = None
    """Of the sampler; null is the model's own."""


@dataclass(frozen=True)
class Outcome:
    """What one edit came to by the end of a round.

    Attributes:
        exact: whether the checker takes the image that is handed over.
        strict: whether it takes it strictly.
        images: painted until then.
        seconds: of processor time until then, painting and looking.
    """

    exact: bool
    strict: bool
    images: int
    seconds: float


@dataclass(frozen=True)
class Point:
    """All edits, with so many rounds at most and so many images each.

    ``images``, ``seconds``: of one edit, on average.
    """

    rounds: int
    best_of: int
    share: Share
    images: float
    seconds: float


def held_out(config: RoundsConfig) -> list[tabletop.Edit]:
    """The edits, as the data jobs draw them."""
    return [
        tabletop.sample_edit(
            np.random.default_rng([config.seed, number]),
            kinds=config.kinds,
            referential=config.referential,
            objects=config.objects,
            outlines=config.outlines,
        )
        for number in range(config.edits)
    ]


def follow(
    edit: tabletop.Edit, paint: Paint, size: int, *, rounds: int, best_of: int, seed: int
) -> list[Outcome]:
    """What an edit came to by the end of each round; one that has ended stays as it is.

    Args:
        edit: what is wanted.
        paint: the painter.
        size: of the source in pixels.
        rounds, best_of: see ``dim.reflection``.
        seed: of the first image.
    """
    reflection: Reflection[Image.Image] = Reflection(
        edit.instruction, edit.blueprint.render(), seed, rounds=rounds, candidates=best_of
    )
    ended: list[float] = []
    painted: list[float] = []
    began = time.process_time()

    def timed(wanted: Sequence[Wanted]) -> Sequence[Image.Image]:
        if painted:
            ended.append(time.process_time() - began)
        images = paint(edit, wanted)
        painted.append(time.process_time() - began)
        return images

    reflect(timed, TabletopOracle(), tabletop.render(edit.source, size), reflection)
    ended.append(time.process_time() - began)
    if best_of == 1:
        ended[0] = painted[0]  # one image of one round is not looked at
    outcomes = []
    for number, seconds in enumerate(ended, 1):
        known = [each for each in reflection.candidates if each.round <= number]
        outcomes.append(_outcome(edit, known, seconds))
    return outcomes + outcomes[-1:] * (rounds - len(outcomes))


def _outcome(
    edit: tabletop.Edit, known: Sequence[Candidate[Image.Image]], seconds: float
) -> Outcome:
    best = max(known, key=lambda candidate: candidate.rank)
    judged = tabletop.judge(best.image, edit.target, edit.source)
    return Outcome(judged.exact, judged.strict, len(known), seconds)


def measure(
    edits: Sequence[tabletop.Edit], paint: Paint, size: int, *, rounds: int, best_of: int
) -> Iterator[Point]:
    """Every number of images a round, with every number of rounds."""
    for candidates in range(1, best_of + 1):
        followed = [
            follow(
                edit, paint, size,
                rounds=rounds, best_of=candidates, seed=_SEEDS_AN_EDIT * number,
            )
            for number, edit in enumerate(track(edits, f"best of {candidates}", transient=True))
        ]  # fmt: skip
        for number in range(rounds):
            outcomes = [each[number] for each in followed]
            yield Point(
                rounds=number + 1,
                best_of=candidates,
                share=Share(
                    sum(each.exact for each in outcomes),
                    sum(each.strict for each in outcomes),
                    len(outcomes),
                ),
                images=float(np.mean([each.images for each in outcomes])),
                seconds=float(np.mean([each.seconds for each in outcomes])),
            )


def run(config: RoundsConfig) -> list[Point]:
    """Measure, and leave table and curve in ``config.out``.

    Raises:
        DimError: there is no such model.
    """
    # Seconds of processor time are those of a CPU, and the same whatever else the machine does.
    painter = model.load(on_this_machine(config.model), device="cpu")

    def paint(edit: tabletop.Edit, wanted: Sequence[Wanted]) -> list[Image.Image]:
        count = len(wanted)
        results = painter.edit(
            [tabletop.render(edit.source, config.size)] * count,
            [edit.instruction] * count,
            blueprints=[each.plan for each in wanted],
            seeds=[each.seed for each in wanted],
            steps=config.steps,
        )
        return [result.image for result in results]

    edits = held_out(config)
    paint(edits[0], [Wanted(edits[0].instruction, 0)])  # the first call of all costs more
    points = list(measure(edits, paint, config.size, rounds=config.rounds, best_of=config.best_of))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "table.md").write_text(as_markdown(points), encoding="utf-8")
    numbers = [asdict(point) for point in points]
    (config.out / "points.json").write_text(json.dumps(numbers, indent=2), encoding="utf-8")
    draw_curve(points, config.out / "rounds.png")
    return points


def as_rows(points: Sequence[Point]) -> list[tuple[str, ...]]:
    """The table's rows as texts."""
    rows: list[tuple[str, ...]] = []
    for point in points:
        low, high = (f"{100 * bound:.0f}" for bound in point.share.interval)
        exact = f"{point.share.accuracy:.0%} ({low}-{high}), {point.share.strict_accuracy:.0%}"
        cost = f"{point.images:.2f}", f"{point.seconds:.2f}"
        rows.append((str(point.best_of), str(point.rounds), exact, *cost))
    return rows


HEAD = ("best of", "rounds", "exact (95 % interval), strictly", "images an edit", "core-seconds")


def as_markdown(points: Sequence[Point]) -> str:
    """The table for a page."""
    lines = [HEAD, ("---:", "---:", "---", "---:", "---:"), *as_rows(points)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def as_table(points: Sequence[Point]) -> Table:
    """The same for a terminal."""
    table = Table(*HEAD)
    for row in as_rows(points):
        table.add_row(*row)
    return table


def draw_curve(points: Sequence[Point], file: Path) -> None:
    """Exact edits by seconds, a line for each number of images a round, a mark for each round."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for best_of in sorted({point.best_of for point in points}):
        line = [point for point in points if point.best_of == best_of]
        bounds = [point.share.interval for point in line]
        exact = [point.share.accuracy for point in line]
        off = [[max(0.0, e - b[0]) for e, b in zip(exact, bounds, strict=True)],
               [max(0.0, b[1] - e) for e, b in zip(exact, bounds, strict=True)]]  # fmt: skip
        seconds = [point.seconds for point in line]
        axes.errorbar(seconds, exact, off, marker="o", capsize=2, label=f"best of {best_of}")
    axes.set_xlabel("core-seconds an edit")
    axes.set_ylabel("exact")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


def main(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="Settings of the experiment.")] = CONFIGS
    / "rounds.yaml",
    model: Annotated[str | None, typer.Option(help="Folder of the painter.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for table and curve.")] = None,
) -> None:
    """Rounds and the best of several: exact edits against the time that they take."""
    said = {"model": model, "out": out and str(out)}
    given = [f"{name}={json.dumps(value)}" for name, value in said.items() if value]
    chosen = load_config(RoundsConfig, config, [*given, *(overrides or [])])
    points = run(chosen)
    console = Console()
    console.print(as_table(points))
    console.print(f"table.md, points.json, rounds.png: {chosen.out.resolve()}", soft_wrap=True)


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
