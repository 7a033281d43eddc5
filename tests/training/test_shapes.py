"""The shapes of a stage's samples: found once, kept, and told to the workers."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dim import model as models
from dim import records
from dim.errors import InputError
from dim.learning.batch import WorkerOrder
from tests.datasets import edit_rows
from tests.feature_shards import cut_latents, write_features
from training import shapes
from training.data import make_order
from training.plan import Plan, measure
from training.record import discard
from training.shapes import SHAPES_FILE, Shapes, find_shapes, read_shapes
from training.stage import StageConfig

# (h, w) in cells of 8 px: squares, pictures upright and on their sides, and a rare one
CELLS = [*[(8, 8)] * 9, *[(8, 6)] * 6, *[(6, 8)] * 4, (6, 12)]


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    plain = write_features(edit_data, folder / "squares", tiny_model_dir)
    return cut_latents(plain, folder / "features", CELLS)


@pytest.fixture
def stage(features: str, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., StageConfig]:
    def make(**changes: Any) -> StageConfig:
        values = {
            "stage": "edit2",
            "init": str(tiny_model_dir),
            "data": [features],
            "out": str(tmp_path / "out"),
            "batch_size": 4,
            "learning_rate": 1,
            "epochs": 3,
            "buckets": True,
        }
        return StageConfig.model_validate(values | changes)

    return make


def test_each_sample_s_shape_is_found_in_its_features(stage: Callable[..., StageConfig]) -> None:
    found = find_shapes(stage())
    assert found is not None
    assert [found.sizes[number] for number in found.ids] == [(8 * w, 8 * h) for h, w in CELLS]
    told = found.told()
    named = {size: count for size, count in zip(told.sizes, told.counts, strict=True) if count}
    assert named == {(64, 64): 9, (48, 64): 6, (64, 48): 4, (96, 48): 1}
    assert find_shapes(stage(buckets=False)) is None


def test_epochs_are_the_steps_of_all_shapes(stage: Callable[..., StageConfig]) -> None:
    assert measure(stage(), find_shapes(stage())) == (3 * (2 + 1 + 1 + 1), 20)
    config = stage(batch_size=5)
    assert measure(config, find_shapes(config)) == (3 * (1 + 1 + 1), 20)  # without the rare one
    found = find_shapes(config)
    plan = Plan(config=config, steps=9, rows=20, tracking_uri="", run_id="", shapes=found.told())
    assert plan.steps_per_epoch == 3
    assert Plan.model_validate(plan.model_dump()) == plan


def test_what_is_left_out_and_what_comes_twice_is_said(stage: Callable[..., StageConfig]) -> None:
    assert find_shapes(stage()).told().announcement(4) == [
        "each batch is of one of 4 shapes, 64x64 the most frequent with 9 samples; 3 samples rest "
        "in an epoch, others in the next",
        "repeated to fill a batch of 4: the samples of 96x48 (1)",
    ]
    assert find_shapes(stage()).told().announcement(5) == [
        "each batch is of one of 3 shapes, 64x64 the most frequent with 9 samples; 5 samples rest "
        "in an epoch, others in the next",
        "repeated to fill a batch of 5: the samples of 64x48 (4)",
        "left out: 1 samples of shapes that have fewer than a batch of 5 with 4 of each: 96x48 (1)",
    ]


def weighted(features: str, second: str, *weights: float) -> list[dict[str, Any]]:
    named = zip((features, second), ("one", "two"), weights, strict=True)
    return [{"uri": uri, "name": name, "weight": weight} for uri, name, weight in named]


def test_an_epoch_of_weighted_sources_is_split_by_shape(
    stage: Callable[..., StageConfig], features: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    upright = cut_latents(features, tmp_path / "upright", [*[(8, 6)] * 10, *[(8, 8)] * 10])
    config = stage(data=weighted(features, upright, 3, 1))  # an epoch of 200: 50 of the second
    found = find_shapes(config)
    told = found.told()
    assert [sum(one) for one in told.sources] == [150, 50] and sum(told.counts) == 200
    steps = sum(count // 4 if count >= 4 else 1 for count in told.counts if count)
    assert measure(config, found) == (3 * steps, 40)
    assert told.shares(4) == pytest.approx([0.75, 0.25], abs=0.01)
    said = told.announcement(4, config.source_names)[-1]
    assert re.fullmatch(r"in batches of one shape it has 7\d.\d% one, 2\d.\d% two", said)
    plan = Plan(config=config, steps=9, rows=40, sources=[20, 20], tracking_uri="", run_id="")
    found.write(config.out)
    order = make_order(plan.model_copy(update={"shapes": told}), models.load(tiny_model_dir))
    assert order.steps_per_epoch == steps
    worker = WorkerOrder(order, 0, 1)
    rows = np.concatenate([worker.rows[worker.batch(step)] for step in range(steps)])
    assert [(rows < 20).mean(), (rows >= 20).mean()] == pytest.approx(told.shares(4), abs=0.02)


def test_a_weighted_source_of_which_no_shape_is_left_is_refused(
    stage: Callable[..., StageConfig], features: str, tmp_path: Path
) -> None:
    rare = cut_latents(features, tmp_path / "rare", [(6, 12)] * 20)
    plain = cut_latents(features, tmp_path / "plain", [(8, 8)] * 20)
    data = [{"uri": plain, "name": "many"}, {"uri": rare, "name": "few", "cap": 4}]
    with pytest.raises(InputError, match="no shape of which few has samples has enough for a ba"):
        find_shapes(stage(data=data, batch_size=20))
    assert find_shapes(stage(data=data, batch_size=16)) is not None
    assert find_shapes(stage(data=weighted(plain, rare, 1, 1), batch_size=20)) is not None


def test_shapes_are_kept_and_not_looked_for_again(
    stage: Callable[..., StageConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stage()
    first = find_shapes(config)
    assert not Path(config.out).exists()
    first.write(config.out)
    assert np.array_equal(read_shapes(config.out, first.told()), first.ids)
    looked: list[int] = []
    plain = shapes.shape_ids
    monkeypatch.setattr(shapes, "shape_ids", lambda *told: (looked.append(1), plain(*told))[1])
    again = find_shapes(config)
    assert again.told() == first.told() and not looked
    assert find_shapes(config, fresh=True).told() == first.told() and looked.pop()
    kept = Path(config.out) / SHAPES_FILE
    kept.write_bytes(kept.read_bytes()[:50])  # a damaged one
    assert find_shapes(config).told() == first.told() and len(looked) == 1
    first.write(config.out)
    more = stage(data=[*config.data, *config.data])  # other data
    assert len(find_shapes(more).ids) == 40 and len(looked) == 2
    discard(config.out)
    assert not kept.exists()


def test_workers_refuse_shapes_that_are_not_the_driver_s(
    stage: Callable[..., StageConfig], tiny_model_dir: Path
) -> None:
    config = stage()
    found = find_shapes(config)
    found.write(config.out)
    told = found.told()
    plan = Plan(config=config, steps=3, rows=20, tracking_uri="", run_id="", shapes=told)
    tiny = models.load(tiny_model_dir)
    assert make_order(plan, tiny).steps_per_epoch == plan.steps_per_epoch == 5
    other = told.model_copy(update={"sizes": [*told.sizes[1:], (8, 8)]})
    with pytest.raises(InputError, match="paints in cells of 16 px at 64 px"):
        make_order(plan.model_copy(update={"shapes": other}), tiny)
    found.ids[0] += 1
    found.write(config.out)
    with pytest.raises(InputError, match="shapes.parquet is not what was found when this run"):
        make_order(plan, tiny)


def test_no_shape_with_enough_samples_is_one_sentence(stage: Callable[..., StageConfig]) -> None:
    with pytest.raises(InputError, match=r"for a batch of 64 with 4 of each; the most, 9, has 64x"):
        find_shapes(stage(batch_size=64))


def test_a_shape_that_is_not_painted_is_refused(
    stage: Callable[..., StageConfig], features: str, tmp_path: Path
) -> None:
    odd = cut_latents(features, tmp_path / "odd", [*CELLS[:-1], (6, 7)])
    with pytest.raises(InputError, match="a latent of 7x6 cells .* none of the shapes of 64 px"):
        find_shapes(stage(data=[odd]))


def picture(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def test_of_images_their_sides_are_asked_or_their_headers(
    stage: Callable[..., StageConfig], make_dataset: Callable[..., str]
) -> None:
    rows = edit_rows(8)
    for number, row in enumerate(rows):
        size = [(200, 300), (64, 64)][number % 2]
        row["image"] = row["image_target"] = picture(*size)
        row["width"], row["height"] = size
    told = make_dataset("told", rows, records.EDIT)
    fields = [field for field in records.EDIT if field.name not in ("width", "height")]
    silent = make_dataset("silent", rows, pa.schema(fields, records.EDIT.metadata))
    for uri in (told, silent):
        found = find_shapes(stage(data=[uri]))
        assert [found.sizes[number] for number in found.ids] == [(48, 80), (64, 64)] * 4


def test_rare_shapes_among_millions_of_samples_are_named() -> None:
    counts = [10_000_000, 3, 300, 70]
    table = [(1024, 1024), (512, 2048), (2048, 512), (896, 1152)]
    told = Shapes(sizes=table, sources=[counts], sha256="")
    assert told.steps_per_epoch(256) == 39062 + 0 + 1 + 1
    lines = told.announcement(256)
    assert lines[0].endswith("10000000 samples; 172 samples rest in an epoch, others in the next")
    assert lines[1] == "repeated to fill a batch of 256: the samples of 896x1152 (70)"
    assert "left out: 3 samples of shapes" in lines[2] and lines[2].endswith(": 512x2048 (3)")
