from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dim import model, records
from dim.errors import InputError, SampleError
from dim.images import decode_image
from dim.model import DIM
from dim.model.sizes import nearest_shape
from tests.datasets import edit_rows, png
from tests.image_files import opened
from training import parallel
from training.data import make_encoder
from training.stage import StageConfig
from training.validation import Painted, Validation, _summarise, picture, read_validation


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def stage(data: str, **validation: object) -> StageConfig:
    held_out = {"data": [data], "samples": 3, "steps": 2, "batch_size": 2} | validation
    return StageConfig.model_validate(
        {
            "stage": "edit1",
            "init": "m",
            "data": [data],
            "out": "o",
            "steps": 1,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "validation": held_out,
        }
    )


def painted_by(tiny: DIM, config: StageConfig, table: pa.Table, world_size: int) -> list[Painted]:
    samples: list[Painted] = []
    for rank in range(world_size):
        part = Validation(config, tiny, table, rank=rank, world_size=world_size)
        samples += part._paint(list(range(len(part._numbers))))
    return sorted(samples, key=lambda sample: sample.number)


def test_the_split_over_workers_changes_nothing(tiny: DIM, held_out_data: str) -> None:
    config = stage(held_out_data)
    table, _ = read_validation(config)
    alone, split = painted_by(tiny, config, table, 1), painted_by(tiny, config, table, 2)
    assert [sample.number for sample in split] == [0, 1, 2]
    for one, other in zip(alone, split, strict=True):
        assert one.text == other.text and one.quartile == other.quartile
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.distance == pytest.approx(other.distance, abs=2e-3)


def metrics_of(tiny: DIM, config: StageConfig) -> dict[str, float]:
    table, judge = read_validation(config)
    outcome = Validation(config, tiny, table, judge, rank=0, world_size=1).run()
    assert outcome is not None
    return outcome[0]


SHAPES = [(96, 64), (64, 96), (64, 64), (96, 64), (200, 40)]


def shaped_rows(sizes: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Edits whose pictures have these sizes, of nothing that the checker knows."""
    rows = edit_rows(len(sizes))
    for row, size in zip(rows, sizes, strict=True):
        for name in ("image", "image_target"):
            row[name] = png(opened(row[name]).resize(size))
        row["provenance"] = None
    return rows


@pytest.mark.parametrize("vlm_view", ["whole", "region"])
def test_samples_are_painted_in_the_shapes_that_training_sees(
    tiny: DIM, make_dataset: Callable[..., str], vlm_view: str
) -> None:
    data = make_dataset("shapes", shaped_rows(SHAPES), records.EDIT)
    given = {"buckets": True, "vlm_view": vlm_view}
    config = stage(data, samples=5).model_copy(update=given)
    table, judge = read_validation(config)
    every = Validation(config, tiny, table, judge, rank=0, world_size=1)
    outcome = every.run()
    assert outcome is not None and outcome[0]["validation_loss"] > 0
    together = painted_together(every)
    sizes = [nearest_shape(size, 64, tiny.cell) for size in SHAPES]
    assert [sample.images[1].size for sample in together] == sizes
    encoder = make_encoder(config, tiny)
    for row, sample in zip(table.to_pylist(), together, strict=True):
        assert sample.images[0].size == sample.images[2].size == sample.images[1].size
        pictures = encoder.prepare(row)
        assert np.array_equal(np.asarray(sample.images[2]), pictures.target.numpy())
        assert np.array_equal(np.asarray(sample.images[0]), pictures.source.numpy())
    # a sample's noise is its number's, whoever it is painted with
    first = Validation(config, tiny, table.slice(0, 1), judge, rank=0, world_size=1)._paint([0])[0]
    assert first.loss == pytest.approx(together[0].loss, rel=1e-3)
    sheet = outcome[1]
    assert sheet.height == 5 * 196
    column = np.asarray(sheet.crop((0, 0, 192, 192)))
    assert column[: 192 * 48 // 80].any() and not column[192 * 48 // 80 + 2 :].any()


def painted_together(validation: Validation) -> list[Painted]:
    found = [
        sample
        for places in validation._features.by_shape()  # type: ignore[union-attr]
        for sample in validation._paint(places)
    ]
    return sorted(found, key=lambda sample: sample.number)


def test_metrics_and_picture_of_a_run(
    tiny: DIM, held_out_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage(held_out_data, grid_rows=2)
    table, judge = read_validation(config)
    sent: list[Painted] = []
    monkeypatch.setattr(parallel, "gather", lambda items: (sent.extend(items), items)[1])
    outcome = Validation(config, tiny, table, judge, rank=0, world_size=1).run()
    assert outcome is not None
    assert [len(sample.images) for sample in sent] == [3, 3, 0]  # what the picture shows
    metrics, sheet = outcome
    by_level = {name for name in metrics if name.startswith("validation_loss/sigma_q")}
    assert by_level and set(metrics) - by_level == {
        "validation_loss",
        "validation_distance",
        "validation_exact",
    }
    assert metrics["validation_loss"] > 0 and 0 < metrics["validation_distance"] < 1
    assert metrics["validation_exact"] == 0  # random weights paint no scene
    assert sheet.height == 2 * 196 and sheet.width == 3 * 196 + 360
    assert metrics_of(tiny, config) == metrics  # the same noise and levels each time


@pytest.mark.parametrize(
    "sampling",
    [
        {"solver": "euler", "steps": 3, "guidance_scale": 2.0, "shift": 3.0, "seed": 7},
        {"solver": "dpm", "steps": 2, "guidance_scale": 1.0},
    ],
)
def test_a_sample_is_painted_as_an_edit_is(
    tiny_model_dir: Path, held_out_data: str, sampling: dict[str, Any]
) -> None:
    changed = model.load(tiny_model_dir)
    own = changed.config.sampling.model_copy(update=sampling)
    changed.config = changed.config.model_copy(update={"sampling": own})
    config = stage(held_out_data, steps=None, batch_size=3)
    table, _ = read_validation(config)
    painted = [np.asarray(one.images[1]) for one in painted_by(changed, config, table, 1)]
    rows = table.to_pylist()

    def edited(**settings: Any) -> list[np.ndarray]:
        made = changed.edit(
            [decode_image(row["image"]) for row in rows],
            [row["instruction"] for row in rows],
            seeds=[own.seed + number for number in range(3)],
            fit="square",
            **settings,
        )
        return [np.asarray(one.image) for one in made]

    def apart(others: list[np.ndarray]) -> float:
        pairs = zip(painted, others, strict=True)
        return max(float(np.abs(one.astype(int) - two).max()) for one, two in pairs)

    assert apart(edited()) <= 2  # features are kept in half precision
    assert apart(edited(steps=own.steps + 3)) > 6
    told = stage(held_out_data, steps=own.steps + 3, guidance_scale=3.0, batch_size=3)
    painted = [np.asarray(one.images[1]) for one in painted_by(changed, told, table, 1)]
    assert apart(edited(steps=own.steps + 3, guidance_scale=3.0)) <= 2


def painted_sample(
    number: int, loss: float, scores: dict[str, float] | None, **more: Any
) -> Painted:
    images = (Image.new("RGB", (64, 64)),) * 3
    return Painted(number, "text", images, loss, 0, more.pop("distance", 0.0), scores, **more)


def test_means_are_over_the_samples_that_have_a_value() -> None:
    right = painted_sample(0, 0.5, {"exact": 1.0, "strict": 1.0})
    wrong = replace(painted_sample(1, 1.5, {"exact": 0.0}, distance=0.5), quartile=2)
    other = painted_sample(2, 1.0, {}, distance=0.25)
    assert _summarise([right, wrong, other]) == {
        "validation_loss": 1.0,
        "validation_loss/sigma_q1": 0.75,
        "validation_loss/sigma_q3": 1.5,
        "validation_distance": 0.25,
        "validation_exact": 0.5,
        "validation_strict": 1.0,
    }
    assert "validation_exact" not in _summarise([other])
    failed = painted_sample(3, 1.0, None)
    assert _summarise([right, failed])["validation_exact"] == 1.0
    assert _summarise([right, failed])["validation_unjudged"] == 1.0


class Jury:
    """A judge that asks for a column, and fails on the samples in ``fails``."""

    columns = ("blueprint",)
    fails: set[str] = set()
    score = ("words", 1.0)

    def judge(self, painted: Any, target: Any, source: Any, row: Any) -> dict[str, float]:
        assert set(row) == {"id", "blueprint"}
        assert painted.size == target.size == source.size == (64, 64)
        if row["id"] in self.fails:
            raise KeyError("no verdict")
        return {self.score[0]: len(row["blueprint"].split()) * self.score[1]}


def make_jury() -> Jury:
    return Jury()


JURY = f"{__name__}:make_jury"


def test_a_judge_of_ones_own_is_given_what_it_asks_for(tiny: DIM, held_out_data: str) -> None:
    metrics = metrics_of(tiny, stage(held_out_data, judge=JURY))
    words = [len(row["blueprint"].split()) for row in edit_rows(3, seed=9)]
    assert metrics["validation_words"] == pytest.approx(np.mean(words))
    assert "validation_exact" not in metrics


def test_photos_are_judged_by_their_likeness(tiny: DIM, held_out_data: str) -> None:
    metrics = metrics_of(tiny, stage(held_out_data, judge="similarity"))
    assert 0 < metrics["validation_psnr"] < 30 and -1 < metrics["validation_ssim"] < 0.9
    assert "validation_exact" not in metrics
    assert "validation_psnr" not in metrics_of(tiny, stage(held_out_data, judge="none"))


def test_what_cannot_be_judged_is_counted_and_named(
    tiny: DIM,
    held_out_data: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(Jury, "fails", {"edit-1"})
    metrics = metrics_of(tiny, stage(held_out_data, judge=JURY))
    assert metrics["validation_unjudged"] == 1 and metrics["validation_words"] > 0
    assert "validation: sample edit-1 cannot be judged: unexpected KeyError" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fails": {"edit-0"}}, "sample edit-0 cannot be judged: unexpected KeyError"),
        ({"score": ("words", float("nan"))}, "sample edit-0 cannot be judged: its words is nan"),
        ({"score": ("loss", 1.0)}, "a judge's score cannot be called 'loss'"),
        ({"score": ("a/b", 1.0)}, "a judge's score cannot be called 'a/b'"),
        ({"columns": ("mood",)}, "needs the column 'mood', which the held-out data do not have"),
    ],
)
def test_a_judge_that_can_never_work_is_an_error_before_training(
    tiny: DIM,
    held_out_data: str,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    said: str,
) -> None:
    for name, value in changes.items():
        monkeypatch.setattr(Jury, name, value)
    config = stage(held_out_data, judge=JURY)
    with pytest.raises(InputError, match=said):
        table, judge = read_validation(config)
        Validation(config, tiny, table, judge, rank=0, world_size=1)


def test_records_without_a_scene_have_no_exactness(
    tiny: DIM, make_dataset: Callable[..., str]
) -> None:
    rows = [row | {"provenance": '{"file": "a.png"}'} for row in edit_rows(2)]
    data = make_dataset("photos", rows, records.EDIT)
    metrics = metrics_of(tiny, stage(data))
    assert "validation_exact" not in metrics and "validation_unjudged" not in metrics
    with pytest.raises(InputError, match="tabletop has no score for sample edit-0"):
        metrics_of(tiny, stage(data, judge="tabletop"))


def test_no_such_judge() -> None:
    with pytest.raises(ValueError, match="there is no judge 'tabeltop'; there are tabletop, sim"):
        stage("d", judge="tabeltop")


def test_the_picture_shows_the_images_in_order() -> None:
    colours = ("red", "green", "blue")
    images = tuple(Image.new("RGB", (64, 64), colour) for colour in colours)
    sheet = picture([Painted(0, "make it blue\n\nsecond line", images, 0, 0, 0)])
    for column, colour in enumerate(colours):
        assert sheet.getpixel((column * 196 + 96, 96)) == Image.new("RGB", (1, 1), colour).getpixel(
            (0, 0)
        )
    text = sheet.crop((3 * 196, 0, sheet.width, sheet.height)).convert("L")
    assert text.getextrema()[1] > 200  # something is written there


def test_a_held_out_sample_that_cannot_be_used_is_an_error_and_is_not_replaced(
    tiny: DIM, make_dataset: Callable[..., str]
) -> None:
    rows = edit_rows(3)
    rows[1]["image_target"] = rows[1]["image_target"][:200]
    config = stage(make_dataset("flawed", rows, records.EDIT))
    with pytest.raises(SampleError, match="the image_target of sample edit-1 is damaged"):
        Validation(config, tiny, read_validation(config)[0], rank=0, world_size=1)
