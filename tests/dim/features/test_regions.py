"""What autoencoder and vision tower see of pictures of any shape, in training and after it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image, ImageDraw

from dim import model, records
from dim.errors import InputError, SampleError
from dim.features.encoder import (
    CachedFeatures,
    FrozenEncoder,
    LiveFeatures,
    Pictures,
    ShardFeatures,
)
from dim.features.format import Preparation, preparation_of
from dim.features.row_groups import whole
from dim.features.shapes import SIDES, shape_ids, sizes
from dim.features.shards import Share, TableSamples
from dim.images import encode_jpeg
from dim.model import DIM
from dim.model.conditioner import ImageFeatures
from dim.model.framing import centre_box, centre_crop
from dim.model.paint import encode_sources
from dim.model.request import Row
from dim.model.sizes import nearest_shape
from infra.models import load_frozen
from infra.samples import open_features, open_images
from tests.datasets import png, write_dataset
from tests.feature_shards import prepare, write_features

SIZES = [(640, 440), (300, 470), (200, 200), (900, 90), (70, 700)]
View = Literal["whole", "region"]


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def frozen(tiny: DIM, *, buckets: bool = True, vlm_view: View = "region") -> FrozenEncoder:
    return FrozenEncoder(tiny, edits=True, resolution=64, buckets=buckets, vlm_view=vlm_view)


def smooth(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """A picture of slow changes, so that each region looks unlike the others."""
    rng = np.random.default_rng(seed)
    few = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    return few.resize(size, Image.Resampling.BICUBIC)


def row_of(source: Image.Image, target: Image.Image | None = None, name: str = "a") -> dict:
    return {
        "id": name,
        "index": 0,
        "source": "s",
        "instruction": "make it red",
        "blueprint": "a plan of it",
        "image": png(source),
        "image_target": png(target or source),
    }


def looks(pictures: Pictures) -> tuple[bytes, bytes]:
    """What the autoencoder and the vision tower are given of a source."""
    assert pictures.source is not None and pictures.patches is not None
    return pictures.source.numpy().tobytes(), pictures.patches.key


def painted_over(image: Image.Image, box: tuple[float, ...], inside: bool) -> Image.Image:
    """Red everywhere outside ``box``; or, inside it, in the four corners."""
    made = image.copy()
    pen = ImageDraw.Draw(made)
    left, top, right, bottom = box
    if inside:
        wide, high = (right - left) / 8, (bottom - top) / 8
        for x in (left, right - wide):
            for y in (top, bottom - high):
                pen.rectangle((x, y, x + wide, y + high), "red")
        return made
    kept = made.crop((math.floor(left), math.floor(top), math.ceil(right), math.ceil(bottom)))
    made.paste("red", (0, 0, *made.size))
    made.paste(kept, (math.floor(left), math.floor(top)))
    return made


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("buckets", [True, False])
def test_the_region_that_is_painted_is_all_that_is_seen(
    tiny: DIM, size: tuple[int, int], buckets: bool
) -> None:
    image, encoder = smooth(size), frozen(tiny, buckets=buckets)
    shape = nearest_shape(size, 64, tiny.cell) if buckets else (64, 64)
    box = centre_box(size, shape)
    before = looks(encoder.prepare(row_of(image)))
    assert encoder.prepare(row_of(image)).target.shape == (shape[1], shape[0], 3)
    # Pillow's filter reaches over the edge by two pixels of what it makes.
    reach = [2.5 * max(1, (box[2] - box[0]) / 64, (box[3] - box[1]) / 64)] * 2
    wider = (box[0] - reach[0], box[1] - reach[1], box[2] + reach[0], box[3] + reach[1])
    assert looks(encoder.prepare(row_of(painted_over(image, wider, inside=False)))) == before
    marked = looks(encoder.prepare(row_of(painted_over(image, box, inside=True))))
    assert marked[0] != before[0] and marked[1] != before[1]
    if wider[0] > 0 or wider[1] > 0:  # something is cut off: as published, it is seen all the same
        whole = frozen(tiny, buckets=buckets, vlm_view="whole")
        changed = painted_over(image, wider, inside=False)
        seen = looks(whole.prepare(row_of(changed)))
        assert seen[0] == before[0]
        assert seen[1] != looks(whole.prepare(row_of(image)))[1]


@pytest.mark.parametrize("size", SIZES)
def test_each_corner_of_the_region_is_a_corner_of_what_is_painted(size: tuple[int, int]) -> None:
    shape = nearest_shape(size, 1024, 32)
    left, top, right, bottom = centre_box(size, shape)
    scale = shape[0] / (right - left)
    assert shape[1] / (bottom - top) == pytest.approx(scale, rel=0.02)  # nothing is stretched
    assert min(left, top) == pytest.approx(0, abs=1.01 / scale)  # and nothing lost that could stay
    assert left == pytest.approx(size[0] - right, abs=1.01 / scale)
    assert top == pytest.approx(size[1] - bottom, abs=1.01 / scale)
    image = Image.new("RGB", size)
    pen = ImageDraw.Draw(image)
    colours = {"red": (left, top), "lime": (right, top), "blue": (left, bottom)}
    for colour, (x, y) in colours.items():
        reach = 12 / scale
        pen.rectangle((x - reach, y - reach, x + reach, y + reach), colour)
    made = centre_crop(image, shape)
    assert made.size == shape
    assert made.getpixel((1, 1)) == (255, 0, 0)
    assert made.getpixel((shape[0] - 2, 1)) == (0, 255, 0)
    assert made.getpixel((1, shape[1] - 2)) == (0, 0, 255)
    assert made.getpixel((shape[0] - 2, shape[1] - 2)) == (0, 0, 0)


def test_a_square_region_of_the_towers_size_is_what_is_painted(tiny: DIM) -> None:
    pictures = frozen(tiny, buckets=False).prepare(row_of(smooth((160, 64))))
    assert pictures.source is not None and pictures.patches is not None
    square = Image.fromarray(pictures.source.numpy())
    patches = tiny.conditioner.patches(square)
    assert patches.key == pictures.patches.key
    assert torch.equal(patches.pixels, pictures.patches.pixels)


def test_a_target_of_another_ratio_is_cut_to_its_sources_shape(tiny: DIM) -> None:
    source, target = smooth((300, 200)), smooth((200, 500), seed=1)
    encoder = frozen(tiny)
    shape = nearest_shape(source.size, 64, tiny.cell)
    pictures = encoder.prepare(row_of(source, target))
    assert pictures.source is not None
    assert pictures.source.shape == pictures.target.shape == (shape[1], shape[0], 3)
    # its own middle, for no one can know which part of it the source shows
    assert np.array_equal(pictures.target.numpy(), np.asarray(centre_crop(target, shape)))
    larger = encoder.prepare(row_of(source, source.resize((600, 400))))
    assert larger.source is not None
    apart = larger.target.float() - larger.source.float()
    assert apart.abs().mean() < 2  # of the same ratio it is the same region
    cut_target, cut_source = encoder.cut(row_of(source, target))
    assert cut_source is not None
    assert np.array_equal(np.asarray(cut_target), pictures.target.numpy())
    assert np.array_equal(np.asarray(cut_source), pictures.source.numpy())


def rows_of_shapes() -> list[dict]:
    """Six samples of three shapes, mixed."""
    found = [(96, 64), (64, 96), (64, 64)] * 2
    return [
        row_of(smooth(size, n), smooth(size, n + 10), name=f"r{n}") | {"index": n}
        for n, size in enumerate(found)
    ]


TEXTS = ["blueprint", "instruction"]
COLUMNS = ["image", "image_target", *TEXTS]
GROUPS = [[0, 3], [1, 4], [2, 5]]


@pytest.fixture(scope="module")
def table() -> pa.Table:
    return pa.Table.from_pylist(rows_of_shapes(), records.EDIT)


@pytest.fixture(scope="module")
def stored(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shapes")
    plain = write_dataset(folder / "plain", rows_of_shapes(), records.EDIT)
    options = {"buckets": True, "vlm_view": "region"}
    return write_features(plain, folder / "out", tiny_model_dir, cutting=options)


def test_features_of_several_shapes(tiny: DIM, table: pa.Table, stored: str) -> None:
    samples = TableSamples(table)
    shards = open_features([stored], TEXTS, edits=True)
    live = LiveFeatures(frozen(tiny), samples, TEXTS)
    cached = CachedFeatures(frozen(tiny), samples, TEXTS, encode_batch=4)
    assert sorted(cached.by_shape()) == GROUPS
    ids = shape_ids(shards, 64, tiny.cell)
    assert ids.tolist() == shape_ids(table, 64, tiny.cell).tolist()
    read = [ShardFeatures(shards, np.arange(6), TEXTS, in_memory=held) for held in (True, False)]
    for places in GROUPS:
        rows, texts = np.array(places), np.zeros(2, np.int64)
        fresh = live.batch(rows, texts)
        width, height = sizes(64, tiny.cell)[ids[places[0]]]
        assert fresh.latent.shape == (2, 8, height // 8, width // 8)
        assert not fresh.latent.is_inference() and not fresh.hidden_states.is_inference()
        for other in (cached, *read):
            kept = other.batch(rows, texts)
            assert torch.equal(kept.mask, fresh.mask)
            for name in ("hidden_states", "latent", "source_latent"):
                one, two = getattr(kept, name), getattr(fresh, name)
                assert torch.allclose(one.float(), two, atol=2e-2, rtol=2**-7), (other, name)
    size = sum(tensor.nbytes for tensor in (cached._states, *cached._latents._stacks)) + sum(
        stack.nbytes
        for stack in cached._sources._stacks  # type: ignore[union-attr]
    )
    assert cached.nbytes == size
    for source in (live, cached, *read):
        with pytest.raises(InputError, match=r"samples of several shapes \(.*x.* and .*\)"):
            source.batch(np.array([0, 1]), np.zeros(2, np.int64))


def test_a_record_that_says_another_shape_is_a_bad_sample(
    tiny: DIM, make_dataset: Callable[..., str]
) -> None:
    rows = rows_of_shapes()
    said = [(None, None), (6400, 9600), (96, 64), (97, 64), (-1, 0), (64, 64)]
    for row, (width, height) in zip(rows, said, strict=True):
        row |= {"width": width, "height": height}
    images = open_images([make_dataset("sides", rows, records.EDIT)], ["id", *COLUMNS])
    live = LiveFeatures(frozen(tiny), Share(images, np.arange(6), SIDES), TEXTS)
    found = live.fetch(np.arange(6), np.zeros(6, np.int64))
    bad = {place: error for place, error in enumerate(found) if isinstance(error, SampleError)}
    assert {place: error.reason for place, error in bad.items()} == {2: "wrong_size"}
    assert "the image of sample r2 is 64x64, and its record says 96x64" in str(bad[2])
    # nobody has placed these by their shape
    plain = LiveFeatures(frozen(tiny), Share(images, np.arange(6)), TEXTS)
    whole(plain.fetch(np.arange(6), np.zeros(6, np.int64)))


def test_what_a_stage_or_model_cannot_use_is_told(tiny: DIM, stored: str) -> None:
    shards = open_features([stored], TEXTS, edits=True)
    of: Any = {"edits": True, "resolution": 64}
    shards.check_preparation(preparation_of(tiny, buckets=True, vlm_view="region", **of))
    with pytest.raises(InputError, match=r"cells of the shapes \(buckets\) \(16 there, None here"):
        shards.check_preparation(preparation_of(tiny, vlm_view="region", **of))
    with pytest.raises(InputError, match=r"\(vlm_view\) \(region there, whole here\)"):
        shards.check_preparation(preparation_of(tiny, buckets=True, **of))


def test_the_key_of_features_made_as_published_is_what_it_was(
    tiny: DIM, tiny_model_dir: Path
) -> None:
    names = [
        "understanding", "autoencoder", "tokenizer", "image_processor", "image_size",
        "max_condition_tokens", "resolution",
    ]  # fmt: skip
    plain = prepare(tiny_model_dir)
    assert list(plain.model_dump()) == names
    old = Preparation.model_validate_json(plain.model_dump_json())
    assert old == plain == preparation_of(tiny, edits=True, resolution=64)
    assert prepare(tiny_model_dir, edits=False).model_dump()["image_size"] is None
    new = preparation_of(tiny, edits=True, resolution=64, buckets=True, vlm_view="region")
    assert new.model_dump() == plain.model_dump() | {"cell": 16, "vlm_view": "region"}
    assert Preparation.model_validate_json(new.model_dump_json()) == new
    # without a source there is nothing to see
    images = preparation_of(tiny, edits=False, resolution=64, vlm_view="region")
    assert images == prepare(tiny_model_dir, edits=False)


def test_the_painters_cells_are_known_without_its_weights(tiny: DIM, tiny_model_dir: Path) -> None:
    assert load_frozen(str(tiny_model_dir)).cell == tiny.cell == 16
    assert load_frozen(f"{Path(__file__).parents[3]}/configs/tiny.yaml").cell == 16


def test_real_photos_of_every_ratio(tiny: DIM, shared_real: Path) -> None:
    folder = shared_real / "edit_pairs"
    lines = (folder / "instructions.jsonl").read_text().splitlines()
    ratios = [(768, 512), (512, 768), (768, 192), (768, 768)]
    rows = []
    for number, line in enumerate(lines[:8]):
        pair, size = json.loads(line), ratios[number % 4]
        images = {"image": "image_path", "image_target": "image_path_target"}
        row = {"id": pair["id"], "index": number, "source": "s"}
        row |= {"instruction": pair["prompt"], "blueprint": pair["prompt"]}
        for name, path in images.items():
            photo = Image.open(folder / pair[path]).convert("RGB")
            row[name] = encode_jpeg(photo.crop((0, 0, *size)))
        rows.append(row)
    table = pa.Table.from_pylist(rows, records.EDIT)
    features = CachedFeatures(frozen(tiny), TableSamples(table), TEXTS)
    assert features.by_shape() == [[0, 4], [1, 5], [2, 6], [3, 7]]
    ids = shape_ids(table, 64, tiny.cell)
    for places in features.by_shape():
        width, height = sizes(64, tiny.cell)[ids[places[0]]]
        batch = features.batch(np.array(places), np.zeros(2, np.int64))
        assert batch.latent.shape[2:] == (height // 8, width // 8)
        assert (width, height) == nearest_shape(ratios[places[0]], 64, tiny.cell)


@pytest.fixture(scope="module")
def region_model(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> DIM:
    """A model as a stage with ``vlm_view: region`` leaves it."""
    folder = tmp_path_factory.mktemp("region") / "model"
    made = model.load(tiny_model_dir)
    made.config = made.config.showing("region")
    made.save(folder)
    return model.load(folder)


def shown_by_edit(dim: DIM, image: Image.Image, fit: Any, monkeypatch: Any) -> ImageFeatures:
    see = dim.conditioner.see
    kept: list[ImageFeatures] = []
    monkeypatch.setattr(dim.conditioner, "see", lambda rows: kept.append(see(rows)) or kept[0])
    dim.edit([image], ["make it red"], fit=fit, steps=1)
    monkeypatch.setattr(dim.conditioner, "see", see)
    return kept[0]


@pytest.mark.parametrize(
    ("size", "fit"),
    [((150, 64), "square"), ((64, 130), "square"), ((160, 96), "source"), ((64, 224), "source")],
)
@pytest.mark.parametrize("vlm_view", ["region", "whole"])
def test_an_edit_is_shown_what_training_was(
    tiny: DIM, region_model: DIM, size: Any, fit: Any, vlm_view: View, monkeypatch: Any
) -> None:
    dim = region_model if vlm_view == "region" else tiny
    assert dim.config.understanding.vlm_view == vlm_view
    image = smooth(size)
    encoder = frozen(dim, buckets=fit == "source", vlm_view=vlm_view)
    pictures = [encoder.prepare(row_of(image))]
    wanted = encoder.see(pictures)
    given = shown_by_edit(dim, image, fit, monkeypatch)
    assert wanted is not None and torch.equal(given.features[0], wanted.features[0])
    other = frozen(dim, buckets=fit == "source", vlm_view="whole" if dim is not tiny else "region")
    unlike = other.see([other.prepare(row_of(image))])
    assert unlike is not None
    assert torch.equal(given.features[0], unlike.features[0]) == (fit == "source")  # all is painted
    shape = (64, 64) if fit == "square" else nearest_shape(size, 64, dim.cell)
    row = Row(0, image, "", None, None, 0, 1.0, shape, size)
    _, latents = encoder.latents(pictures)
    assert latents is not None
    assert torch.equal(encode_sources(dim.autoencoder, [row], fit)[0], latents[0])


def test_a_folder_of_before_there_were_views_is_one_of_whole_sources(
    tiny_model_dir: Path, region_model: DIM, tmp_path: Path
) -> None:
    # what is as published is not written, so an old folder and a new one are alike
    assert "vlm_view" not in (tiny_model_dir / "dim.json").read_text()
    assert model.load(tiny_model_dir).config.understanding.vlm_view == "whole"
    region_model.save(tmp_path / "again")
    assert '"vlm_view": "region"' in (tmp_path / "again" / "dim.json").read_text()
