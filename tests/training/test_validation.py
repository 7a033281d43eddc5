from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dim import model, records, tabletop
from dim.errors import InputError, SampleError
from dim.model import DIM
from dim.model.sizes import nearest_shape
from tests.datasets import edit_rows, png
from tests.image_files import opened
from training.data import make_encoder
from training.stage import StageConfig
from training.validation import (
    Painted,
    Validation,
    _judged,
    _summarise,
    picture,
    read_validation,
    target_scene,
)

SCENE = tabletop.sample_scene(np.random.default_rng(0))


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
    table = read_validation(config)
    alone, split = painted_by(tiny, config, table, 1), painted_by(tiny, config, table, 2)
    assert [sample.number for sample in split] == [0, 1, 2]
    for one, other in zip(alone, split, strict=True):
        assert one.text == other.text
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.distance == pytest.approx(other.distance, abs=2e-3)


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
    table = read_validation(config)
    every = Validation(config, tiny, table, rank=0, world_size=1)
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
    first = Validation(config, tiny, table.slice(0, 1), rank=0, world_size=1)._paint([0])[0]
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


def test_metrics_and_picture_of_a_run(tiny: DIM, held_out_data: str) -> None:
    config = stage(held_out_data, grid_rows=2)
    outcome = Validation(config, tiny, read_validation(config), rank=0, world_size=1).run()
    assert outcome is not None
    metrics, sheet = outcome
    assert set(metrics) == {"validation_loss", "validation_distance", "validation_exact"}
    assert metrics["validation_loss"] > 0 and 0 < metrics["validation_distance"] < 1
    assert metrics["validation_exact"] == 0  # random weights paint no scene
    assert sheet.height == 2 * 196 and sheet.width == 3 * 196 + 360


def test_scores_of_a_perfect_and_of_a_wrong_image() -> None:
    right = Painted(0, "text", (tabletop.render(SCENE, 64),) * 3, 0.5, 0.0, True)
    wrong = Painted(1, "text", (Image.new("RGB", (64, 64)),) * 3, 1.5, 0.5, False)
    other = Painted(2, "text", (Image.new("RGB", (64, 64)),) * 3, 1.0, 0.25, None)
    assert _summarise([right, wrong, other]) == {
        "validation_loss": 1.0,
        "validation_distance": 0.25,
        "validation_exact": 0.5,
    }
    assert "validation_exact" not in _summarise([other])
    assert _summarise([replace(right, strict=True), replace(wrong, strict=False)]) == {
        "validation_loss": 1.0,
        "validation_distance": 0.25,
        "validation_exact": 0.5,
        "validation_strict": 0.5,
    }


def test_an_image_is_judged_by_the_scenes_of_its_record() -> None:
    edited = SCENE.without(SCENE.objects[0])
    image = tabletop.render(edited, 64)
    source, target = (json.loads(scene.to_json()) for scene in (SCENE, edited))
    both = json.dumps({"tabletop": {"source_scene": source, "target_scene": target}})
    assert _judged(image, both) == {"exact": True, "strict": True}
    faded = Image.blend(image, Image.new("RGB", image.size, "white"), 0.15)
    assert _judged(faded, both) == {"exact": True, "strict": False}
    alone = json.dumps({"tabletop": {"target_scene": target}})  # nobody knows what should stay
    assert _judged(image, alone) == {"exact": True, "strict": None}
    assert _judged(image, json.dumps({"tabletop": {"scene": target}})) == {
        "exact": True,
        "strict": True,
    }
    assert _judged(image, None) == {"exact": None, "strict": None}


def test_the_picture_shows_the_images_in_order() -> None:
    colours = ("red", "green", "blue")
    images = tuple(Image.new("RGB", (64, 64), colour) for colour in colours)
    sheet = picture([Painted(0, "make it blue\n\nsecond line", images, 0, 0, None)])
    for column, colour in enumerate(colours):
        assert sheet.getpixel((column * 196 + 96, 96)) == Image.new("RGB", (1, 1), colour).getpixel(
            (0, 0)
        )
    text = sheet.crop((3 * 196, 0, sheet.width, sheet.height)).convert("L")
    assert text.getextrema()[1] > 200  # something is written there


def test_the_scene_of_a_record() -> None:
    as_text = json.dumps({"tabletop": {"target_scene": SCENE.to_json()}})
    as_object = json.dumps({"tabletop": {"scene": json.loads(SCENE.to_json())}})
    assert target_scene(as_text) == target_scene(as_object) == SCENE
    assert target_scene(None) is None and target_scene('{"file": "a.png"}') is None
    with pytest.raises(InputError, match="provenance is no JSON object"):
        target_scene("[1")


def test_a_held_out_sample_that_cannot_be_used_is_an_error_and_is_not_replaced(
    tiny: DIM, make_dataset: Callable[..., str]
) -> None:
    rows = edit_rows(3)
    rows[1]["image_target"] = rows[1]["image_target"][:200]
    config = stage(make_dataset("flawed", rows, records.EDIT))
    with pytest.raises(SampleError, match="the image_target of sample edit-1 is damaged"):
        Validation(config, tiny, read_validation(config), rank=0, world_size=1)
