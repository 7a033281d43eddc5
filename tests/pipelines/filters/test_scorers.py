from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
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
    views = [embedder.view(photo(number)) for number in (1, 2)]
    first, second = embedder.embed(views)
    assert first.shape == (features,) and np.linalg.norm(first) == pytest.approx(1, abs=1e-5)
    assert np.array_equal(first, embedder.embed(views[:1])[0])
    assert first @ second < 0.9999
    assert scorers.embedder(str(models / name)) is embedder


def test_the_classifier_gives_probabilities(models: Path) -> None:
    path = str(models / "classifier")
    asked = [scorers.classifier(path, label) for label in ("normal", "nsfw")]
    scores = [each.scores([each.view(photo(1))])[0] for each in asked]
    assert sum(scores) == pytest.approx(1, abs=1e-5) and min(scores) > 0
    with pytest.raises(InputError, match=r"no label 'nude'; it has \['normal', 'nsfw'\]"):
        scorers.classifier(path, "nude")


def test_the_aesthetic_head_is_linear_over_the_embedding(models: Path, tmp_path: Path) -> None:
    weight = np.arange(8, dtype=np.float32)[None]
    save_file({"weight": weight, "bias": np.array([5.0], np.float32)}, tmp_path / "head")
    clip = scorers.embedder(str(models / "clip"))
    (embedding,) = clip.embed([clip.view(photo(1))])
    aesthetic = scorers.aesthetic(str(models / "clip"), str(tmp_path / "head"))
    (score,) = aesthetic.scores([aesthetic.view(photo(1))])
    assert score == pytest.approx(float(embedding @ weight[0]) + 5.0, abs=1e-5)
    save_file({"weight": weight[:, :4]}, tmp_path / "other")
    with pytest.raises(InputError, match="no linear head in safetensors: 'bias'"):
        scorers.aesthetic(str(models / "clip"), str(tmp_path / "other"))


@pytest.mark.parametrize("size", [1, 4])
def test_neighbours_change_nothing(
    models: Path, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is looked at together is of one size, and the last is filled up."""
    monkeypatch.setattr(scorers, "_AT_ONCE", {"cpu": size})
    embedder = scorers.embedder(str(models / "clip"))
    views = [embedder.view(photo(number)) for number in range(6)]
    sizes: list[int] = []
    forward = embedder._model.vision_model.forward

    def counted(pixel_values: torch.Tensor, **more: Any) -> Any:
        sizes.append(len(pixel_values))
        return forward(pixel_values=pixel_values, **more)

    monkeypatch.setattr(embedder._model.vision_model, "forward", counted)
    together = embedder.embed(views)
    assert sizes == [size] * -(-6 // size)
    for view, embedding in zip(views, together, strict=True):
        assert np.array_equal(embedder.embed([view])[0], embedding)


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


def test_a_gpu_that_is_not_there_is_missed(models: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    rules = ImageRules(nsfw_model=str(models / "classifier"), gpus=0.5, **PLAIN)
    with pytest.raises(InputError, match="filters.gpus wants a GPU, and torch sees none"):
        FilterImages(rules)(images(encoded(photo(1))))


def test_a_picture_that_a_model_cannot_look_at_fails_alone(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = ImageRules(nsfw_model=str(models / "classifier"), max_nsfw=1.0, **PLAIN)
    scores = scorers.Classifier.scores
    bad = scorers.classifier(str(models / "classifier"), "nsfw").view(photo(2))

    def broken(self: scorers.Classifier, views: list[Any]) -> list[float]:
        if any(np.array_equal(view, bad) for view in views):
            raise ValueError("no such luck")
        return scores(self, views)

    monkeypatch.setattr(scorers.Classifier, "scores", broken)
    rows = FilterImages(rules)(images(*(encoded(photo(n)) for n in range(4)))).to_pylist()
    assert [row["outcome"] for row in rows] == ["kept", "kept", "failed", "kept"]
    assert rows[2]["error"] == "no such luck" and rows[2]["image"] is None
    assert [measure["name"] for measure in rows[3]["measures"]][1:2] == ["nsfw"]


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
