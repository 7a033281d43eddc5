from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from safetensors.numpy import save_file

from dim import records
from dim.errors import InputError
from pipelines.filters import FilterImages, FilterPairs, ImageRules, PairRules, scorers
from tests.pipelines.models import save_classifier, save_clip, save_dino
from tests.pipelines.samples import edited, encoded, photo

PLAIN = dict.fromkeys(("min_side", "min_entropy", "min_sharpness", "max_text_area"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of tiny random models: clip, dino, classifier."""
    folder = tmp_path_factory.mktemp("models")
    save_clip(folder / "clip")
    save_dino(folder / "dino")
    save_classifier(folder / "classifier", ["normal", "nsfw"])
    return folder


@pytest.mark.parametrize(("name", "features"), [("clip", 8), ("dino", 16)])
def test_embeddings_tell_pictures_apart(models: Path, name: str, features: int) -> None:
    embedder = scorers.embedder(str(models / name))
    first, second = embedder.embed(photo(1)), embedder.embed(photo(2))
    assert first.shape == (features,) and np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(first, embedder.embed(photo(1)))
    assert first @ second < 0.9999
    assert scorers.embedder(str(models / name)) is embedder


def test_the_classifier_gives_probabilities(models: Path) -> None:
    path = str(models / "classifier")
    scores = [scorers.classifier(path, label).score(photo(1)) for label in ("normal", "nsfw")]
    assert sum(scores) == pytest.approx(1, abs=1e-5) and min(scores) > 0
    with pytest.raises(InputError, match=r"no label 'nude'; it has \['normal', 'nsfw'\]"):
        scorers.classifier(path, "nude")


def test_the_aesthetic_head_is_linear_over_the_embedding(models: Path, tmp_path: Path) -> None:
    weight = np.arange(8, dtype=np.float32)[None]
    save_file({"weight": weight, "bias": np.array([5.0], np.float32)}, tmp_path / "head")
    embedding = scorers.embedder(str(models / "clip")).embed(photo(1))
    score = scorers.aesthetic(str(models / "clip"), str(tmp_path / "head")).score(photo(1))
    assert score == pytest.approx(float(embedding @ weight[0]) + 5.0, abs=1e-5)
    save_file({"weight": weight[:, :4]}, tmp_path / "other")
    with pytest.raises(InputError, match="no linear head in safetensors: 'bias'"):
        scorers.aesthetic(str(models / "clip"), str(tmp_path / "other"))


def test_models_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no folder of a transformers model"):
        scorers.embedder(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        scorers.embedder(str(tmp_path))


def images(*pictures: bytes) -> pa.Table:
    rows = [
        {"id": str(n), "index": n, "source": "t", "image": image}
        for n, image in enumerate(pictures)
    ]
    return pa.Table.from_pylist(rows, schema=records.RAW_IMAGE)


@pytest.mark.parametrize(("limit", "reason"), [(1.0, None), (0.0, "image.unsafe"), (None, None)])
def test_unsafe_images_go(models: Path, limit: float | None, reason: str | None) -> None:
    rules = ImageRules(nsfw_model=str(models / "classifier"), max_nsfw=limit, **PLAIN)
    (row,) = FilterImages(rules)(images(encoded(photo(1)))).to_pylist()
    assert row["reason"] == reason
    assert ("nsfw" in {measure["name"] for measure in row["measures"]}) == (limit is not None)


@pytest.mark.parametrize(("bias", "reason"), [(4.0, "image.unaesthetic"), (5.0, None)])
def test_ugly_images_go(models: Path, tmp_path: Path, bias: float, reason: str | None) -> None:
    head = {"weight": np.zeros((1, 8), np.float32), "bias": np.array([bias], np.float32)}
    save_file(head, tmp_path / "head")
    rules = ImageRules(
        aesthetic_model=str(models / "clip"), aesthetic_head=str(tmp_path / "head"), **PLAIN
    )
    (row,) = FilterImages(rules)(images(encoded(photo(1)))).to_pylist()
    assert row["reason"] == reason


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_pairs_must_mean_the_same(models: Path, name: str) -> None:
    source, target = encoded(photo(1)), encoded(edited(photo(1)))
    row = {
        "id": "a",
        "index": 0,
        "source": "t",
        "instruction": "Add it.",
        "image": source,
        "image_target": target,
        "image_hash": "1",
        "image_target_hash": "2",
    }
    batch = pa.Table.from_pylist([row], schema=records.RAW_PAIR)
    for limit, reason in ((-1.0, None), (0.999999, f"pair.{name}_low")):
        rules = PairRules(**PLAIN, **{f"{name}_model": str(models / name), f"min_{name}": limit})
        (result,) = FilterPairs(rules)(batch).to_pylist()
        assert result["reason"] == reason
        measured = {measure["name"]: measure["value"] for measure in result["measures"]}
        assert -1 <= measured[name] < 0.999999
