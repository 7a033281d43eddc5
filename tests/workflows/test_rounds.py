"""Rounds counted on a painter that is right now and then, and the whole command on a tiny model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

from dim import cli, tabletop
from dim.config import load_config
from dim.reflection import Wanted
from pipelines.evaluate import Share
from workflows.rounds import (
    CONFIGS,
    Point,
    RoundsConfig,
    as_markdown,
    draw_curve,
    follow,
    held_out,
    measure,
)

SIZE = 64
WORLD = load_config(RoundsConfig, CONFIGS / "rounds.yaml", ["model=none", "edits=3"])


class Painter:
    """Right with the seeds that end in ``right``; else it gives the source back."""

    def __init__(self, *right: int) -> None:
        self.right, self.asked = right, 0

    def __call__(self, edit: tabletop.Edit, wanted: Sequence[Wanted]) -> list[Image.Image]:
        self.asked += len(wanted)
        assert {each.plan for each in wanted} == {edit.blueprint.render()}
        return [
            tabletop.render(edit.target if each.seed % 1000 in self.right else edit.source, SIZE)
            for each in wanted
        ]


def test_held_out_edits_are_those_of_the_data_jobs() -> None:
    first, second, _ = held_out(WORLD)
    assert first != second and first == held_out(WORLD)[0]
    assert {edit.kind for edit in held_out(WORLD)} <= set(WORLD.kinds)


def test_an_edit_is_painted_until_it_is_exact() -> None:
    edit, painter = held_out(WORLD)[0], Painter(2)
    outcomes = follow(edit, painter, SIZE, rounds=4, best_of=1, seed=0)
    assert [each.exact for each in outcomes] == [False, False, True, True]
    assert [each.images for each in outcomes] == [1, 2, 3, 3] and painter.asked == 3
    assert outcomes[2].strict and not outcomes[1].strict
    seconds = [each.seconds for each in outcomes]
    assert 0 < seconds[0] < seconds[1] < seconds[2] == seconds[3]
    both = follow(edit, Painter(2), SIZE, rounds=4, best_of=2, seed=0)
    assert [(each.exact, each.images) for each in both] == [(False, 2)] + 3 * [(True, 4)]


def test_every_number_of_images_with_every_number_of_rounds() -> None:
    points = list(measure(held_out(WORLD), Painter(1), SIZE, rounds=2, best_of=2))
    found = [(p.best_of, p.rounds, p.share.accuracy, p.images) for p in points]
    assert found == [(1, 1, 0.0, 1.0), (1, 2, 1.0, 2.0), (2, 1, 1.0, 2.0), (2, 2, 1.0, 2.0)]


def test_the_table_and_the_curve(tmp_path: Path) -> None:
    points = [
        Point(1, 1, Share(3, 1, 10), 1.0, 0.5),
        Point(2, 1, Share(6, 1, 10), 1.7, 0.95),
        Point(1, 2, Share(0, 0, 10), 2.0, 1.0),
    ]
    lines = as_markdown(points).splitlines()
    assert lines[2] == "| 1 | 1 | 30% (11-60), 10% | 1.00 | 0.50 |"
    assert len(lines) == 5
    draw_curve(points, tmp_path / "rounds.png")
    assert Image.open(tmp_path / "rounds.png").size == (840, 540)


def test_the_command(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["experiment", "rounds", "--model", str(tiny_model_dir), "--out", str(tmp_path)]
    settings = ["edits=1", "rounds=2", "best_of=2", "steps=1"]
    assert cli.execute(cli.root(), [*arguments, *settings], prog_name="dim") == 0
    assert "core-seconds" in capsys.readouterr().out
    points = json.loads((tmp_path / "points.json").read_text())
    assert [(one["best_of"], one["rounds"], one["images"]) for one in points] == [
        (1, 1, 1.0), (1, 2, 2.0), (2, 1, 2.0), (2, 2, 4.0),
    ]  # fmt: skip
    assert (tmp_path / "rounds.png").is_file() and (tmp_path / "table.md").is_file()
    missing = [*arguments[:2], "--out", str(tmp_path)]
    assert cli.execute(cli.root(), missing, prog_name="dim") == 2
    assert "model" in capsys.readouterr().err
