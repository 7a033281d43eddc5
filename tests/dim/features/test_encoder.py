from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from dim import model, records
from dim.errors import SampleError
from dim.features import encoder
from dim.features.encoder import (
    CachedFeatures,
    Features,
    FeatureSource,
    FrozenEncoder,
    LiveFeatures,
    ShardFeatures,
)
from dim.features.format import relative_error, unpack_bf16
from dim.features.row_groups import whole
from dim.features.shards import FeatureShards, Share, TableSamples
from dim.images import decode_image, encode_jpeg
from dim.model import DIM
from infra.samples import open_features, open_images
from tests.datasets import edit_rows
from tests.feature_shards import write_features
from tests.image_files import opened

TEXTS = ["blueprint", "instruction"]
COLUMNS = ["id", "image", "image_target", *TEXTS]

warnings.filterwarnings("ignore", message="a prompt of .* tokens is longer")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


@pytest.fixture(scope="module")
def samples(edit_data: str) -> TableSamples:
    return TableSamples(open_images([edit_data], COLUMNS).read(np.arange(6)))


@pytest.fixture(scope="module")
def cached(tiny: DIM, samples: TableSamples) -> CachedFeatures:
    return CachedFeatures(encoder_of(tiny), samples, TEXTS, encode_batch=4)


def encoder_of(tiny: DIM, edits: bool = True) -> FrozenEncoder:
    return FrozenEncoder(tiny, edits=edits, resolution=64)


def test_cached_and_live_features_agree(
    tiny: DIM, samples: TableSamples, cached: CachedFeatures
) -> None:
    live = LiveFeatures(encoder_of(tiny), samples, TEXTS)
    rows, texts = np.array([5, 0, 3]), np.array([0, 1, 0])
    kept, fresh = cached.batch(rows, texts), live.batch(rows, texts)
    assert torch.equal(kept.mask, fresh.mask)
    for name in ("hidden_states", "latent", "source_latent"):
        one, other = getattr(kept, name), getattr(fresh, name)
        kept_as = torch.float16 if name == "hidden_states" else torch.float32
        assert (one.dtype, other.dtype) == (kept_as, torch.float32)
        assert torch.allclose(one.float(), other, atol=2e-2, rtol=2e-3), name  # float16 or float32


def test_a_batch_is_padded_to_its_longest_row_only(cached: CachedFeatures) -> None:
    short = cached.batch(np.array([0]), np.array([1]))
    both = cached.batch(np.array([0, 0]), np.array([1, 0]))
    tokens = short.hidden_states.shape[1]
    assert short.mask.all() and tokens < both.hidden_states.shape[1]
    assert both.mask.sum(1).tolist() == [tokens, both.hidden_states.shape[1]]
    assert torch.equal(both.hidden_states[0, :tokens], short.hidden_states[0])
    assert not both.hidden_states[0, tokens:].any()


def test_source_and_target_are_not_mixed_up(tiny: DIM, samples: TableSamples) -> None:
    rows = whole(samples.fetch(np.arange(2)))
    edits, plain = encoder_of(tiny), encoder_of(tiny, edits=False)
    latent, source = edits.latents([edits.prepare(row) for row in rows])
    alone, nothing = plain.latents([plain.prepare(row) for row in rows])
    assert nothing is None and source is not None
    for one, other, third in zip(latent, source, alone, strict=True):
        assert torch.equal(third, other) and not torch.equal(one, other)


def test_progress_counts_rows(tiny: DIM, samples: TableSamples) -> None:
    seen: list[tuple[int, int]] = []
    CachedFeatures(
        encoder_of(tiny),
        samples,
        ["instruction"],
        encode_batch=4,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(4, 6), (6, 6)]


def test_memory_and_cut_texts_are_counted(cached: CachedFeatures) -> None:
    assert cached.nbytes > 6 * 2 * 32 * 16 * 2  # more than the latents alone
    assert cached.count_cut(1) == 12 and cached.count_cut(10_000) == 0


def test_a_broken_image_is_named(tiny: DIM, make_dataset: Callable[..., str]) -> None:
    row = {"id": "bad", "index": 0, "source": "s", "image": b"no image", "image_target": b"?"}
    row |= {"blueprint": "b", "instruction": "i"}
    images = open_images([make_dataset("broken", [row], records.EDIT)], COLUMNS)
    with pytest.raises(SampleError, match="the image of sample bad"):
        CachedFeatures(encoder_of(tiny), Share(images, np.arange(1)), TEXTS)


@pytest.fixture(scope="module")
def shards(
    edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, FeatureShards]:
    """Feature shards by their encoding."""
    folder = tmp_path_factory.mktemp("shards")
    found = {}
    for encoding in ("bf16", "int8"):
        uri = write_features(edit_data, folder / encoding, tiny_model_dir, encoding=encoding)
        found[encoding] = open_features([uri], TEXTS, edits=True)
    return found


ROWS, CHOSEN = np.array([5, 0, 3]), np.array([0, 1, 0])


def batch_of(shards: FeatureShards, in_memory: bool) -> Features:
    """Of rows 5, 0 and 3, as a worker that owns six rows in another order has them."""
    owned = np.array([3, 5, 1, 0, 2, 4])
    features = ShardFeatures(shards, owned, TEXTS, in_memory=in_memory)
    assert features.in_memory == in_memory and (features.nbytes > 0) == in_memory
    return features.batch(np.array([1, 3, 0]), CHOSEN)


@pytest.mark.parametrize("in_memory", [True, False])
def test_features_from_shards_are_the_live_ones(
    tiny: DIM, samples: TableSamples, shards: dict[str, FeatureShards], in_memory: bool
) -> None:
    stored = batch_of(shards["bf16"], in_memory)
    live = LiveFeatures(encoder_of(tiny), samples, TEXTS).batch(ROWS, CHOSEN)
    assert torch.equal(stored.mask, live.mask)
    for name in ("hidden_states", "latent", "source_latent"):
        one, other = getattr(stored, name), getattr(live, name)
        assert one.dtype == other.dtype == torch.float32
        assert torch.allclose(one, other, rtol=2**-8, atol=1e-4), name  # half a bfloat16 step
        assert torch.equal(one, one.bfloat16().float()), name
    assert not stored.hidden_states[~stored.mask].any()


def test_8_bit_states_are_nearly_the_same(shards: dict[str, FeatureShards]) -> None:
    exact, rough = batch_of(shards["bf16"], False), batch_of(shards["int8"], False)
    assert torch.equal(exact.latent, rough.latent)
    assert 0 < relative_error(exact.hidden_states, rough.hidden_states) < 0.015
    held = batch_of(shards["int8"], True)
    assert torch.equal(held.hidden_states, rough.hidden_states)


def test_the_stored_numbers_are_given_exactly(shards: dict[str, FeatureShards]) -> None:
    stored = batch_of(shards["bf16"], False)
    (row,) = shards["bf16"].read(ROWS[:1], ["blueprint_states", "blueprint_tokens", "latent"])
    tokens = row["blueprint_tokens"]
    states = unpack_bf16(row["blueprint_states"], (tokens, 128))
    assert torch.equal(stored.hidden_states[0, :tokens].bfloat16(), states)
    assert torch.equal(stored.latent[0].bfloat16(), unpack_bf16(row["latent"], (8, 8, 8)))


def test_texts_that_fill_the_condition_are_counted(shards: dict[str, FeatureShards]) -> None:
    held = ShardFeatures(shards["bf16"], np.arange(6), TEXTS, in_memory=True)
    assert held.count_cut(1) == 12 and held.count_cut(10_000) == 0


def test_a_damaged_value_is_named_with_its_sample(
    shards: dict[str, FeatureShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = FeatureShards.fetch

    def damaged(self: FeatureShards, rows: np.ndarray, columns: list[str]) -> list[dict]:
        found = whole(fetch(self, rows, columns))
        return [{**row, "blueprint_states": row["blueprint_states"][:-2]} for row in found]

    monkeypatch.setattr(FeatureShards, "fetch", damaged)
    features = ShardFeatures(shards["bf16"], np.arange(6), TEXTS, in_memory=False)
    with pytest.raises(SampleError, match="the blueprint_states of sample 'edit-2' are damaged"):
        features.batch(np.array([2]), np.array([0]))


def broken_rows(count: int = 8) -> list[dict]:
    """Edits of which number 2 is no image, 3 a JPEG that is cut short, and 5 has no blueprint."""
    rows = edit_rows(count)
    rows[2]["image"] = b"\xff\xd8\xff\xe0 no picture"
    target = opened(rows[3]["image_target"])
    rows[3]["image_target"] = encode_jpeg(target)[:-200]
    rows[5]["blueprint"] = None
    return rows


REASONS = {2: "undecodable", 3: "undecodable", 5: "missing_value"}


@pytest.mark.parametrize("live", [True, False])
def test_each_bad_sample_is_told_and_spoils_no_other(
    tiny: DIM, make_dataset: Callable[..., str], live: bool
) -> None:
    uri = make_dataset("flawed", broken_rows(), records.EDIT)
    share = Share(open_images([uri], COLUMNS), np.arange(8))
    features: FeatureSource[Any] = (
        LiveFeatures(encoder_of(tiny), share, TEXTS, threads=2)
        if live
        else CachedFeatures(encoder_of(tiny), share, TEXTS, encode_batch=3, threads=2)
    )
    texts = np.ones(8, np.int64)  # of the instructions, which all have
    found = features.fetch(np.arange(8), texts)
    bad = {at: item for at, item in enumerate(found) if isinstance(item, SampleError)}
    assert {at: error.reason for at, error in bad.items()} == REASONS
    assert "the image of sample edit-2 is" in str(bad[2])
    assert "the image_target of sample edit-3 is damaged" in str(bad[3])
    assert "sample 'edit-5' in" in str(bad[5]) and "has no blueprint" in str(bad[5])
    good = [item for item in found if not isinstance(item, SampleError)]
    whole_ones = features.collate(good)
    rows = np.array([0, 1, 4, 6, 7])
    clean = TableSamples(pa.Table.from_pylist(edit_rows(8), records.EDIT))
    wanted = LiveFeatures(encoder_of(tiny), clean, TEXTS).batch(rows, texts[:5])
    assert torch.equal(whole_ones.mask, wanted.mask)
    assert torch.allclose(whole_ones.latent, wanted.latent, atol=2e-2, rtol=2e-3)
    if not live:
        assert sorted(features.bad) == sorted(REASONS)  # type: ignore[attr-defined]


def test_each_picture_is_decoded_once_and_off_the_steps_thread(
    tiny: DIM, samples: TableSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[tuple[str, int]] = []

    def watched(data: bytes, *, name: str) -> Any:
        decoded.append((name, threading.get_ident()))
        return decode_image(data, name=name)

    monkeypatch.setattr(encoder, "decode_image", watched)
    live = LiveFeatures(encoder_of(tiny), samples, TEXTS, threads=2)
    fetched = whole(live.fetch(np.array([4, 1]), np.array([0, 0])))
    named = sorted(name for name, _ in decoded)
    assert named == sorted(
        f"the {column} of sample edit-{number}"
        for column in ("image", "image_target")
        for number in (1, 4)
    )
    assert threading.get_ident() not in {thread for _, thread in decoded}
    live.collate(fetched)
    assert len(decoded) == 4
    pictures = fetched[0].pictures
    assert pictures.target.dtype == torch.uint8 and pictures.target.shape == (64, 64, 3)


def test_a_missing_text_makes_a_sample_bad_whichever_is_drawn(
    shards: dict[str, FeatureShards], monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch = FeatureShards.fetch

    def without(self: FeatureShards, rows: np.ndarray, columns: list[str]) -> list[Any]:
        assert "blueprint_tokens" in columns and "instruction_tokens" in columns
        return fetch(self, rows, columns)

    monkeypatch.setattr(FeatureShards, "fetch", without)
    features = ShardFeatures(shards["bf16"], np.arange(6), TEXTS, in_memory=False)
    assert len(whole(features.fetch(np.array([2, 3]), np.array([0, 1])))) == 2


def test_nothing_that_can_be_cached_is_an_error(
    tiny: DIM, make_dataset: Callable[..., str]
) -> None:
    rows = broken_rows()[2:4]
    share = Share(open_images([make_dataset("bad", rows, records.EDIT)], COLUMNS), np.arange(2))
    with pytest.raises(SampleError, match="sample edit-"):
        CachedFeatures(encoder_of(tiny), share, TEXTS)


def test_what_float16_cannot_hold_is_a_bad_sample(
    tiny: DIM, samples: TableSamples, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = FrozenEncoder.latents

    def far_out(self: FrozenEncoder, pictures: Any) -> Any:
        latents, sources = plain(self, pictures)
        latents[0] = latents[0] + 1e5
        return latents, sources

    monkeypatch.setattr(FrozenEncoder, "latents", far_out)
    features = CachedFeatures(encoder_of(tiny), samples, TEXTS, encode_batch=6)
    ((place, error),) = features.bad.items()
    assert error.reason == "damaged_features" and "cannot be kept as float16" in str(error)
    good = [number for number in range(6) if number != place]
    batch = features.batch(np.array(good), np.zeros(5, np.int64))
    assert batch.latent.isfinite().all()


def test_what_goes_to_a_gpu_is_in_pinned_memory(
    tiny: DIM, samples: TableSamples, shards: dict[str, FeatureShards], monkeypatch: Any
) -> None:
    gpu, kept = torch.device("cuda"), []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: (kept.append(self), self)[1])
    frozen = encoder_of(tiny)
    frozen.prepare(whole(samples.fetch(np.arange(1)))[0])
    assert kept == []
    monkeypatch.setattr(FrozenEncoder, "device", gpu)
    pictures = frozen.prepare(whole(samples.fetch(np.arange(1)))[0])
    assert pictures.patches is not None and len(kept) == 3
    assert any(one is pictures.patches.pixels for one in kept)
    kept.clear()
    features = ShardFeatures(shards["bf16"], np.arange(2), TEXTS, in_memory=False, device=gpu)
    stored = whole(features.fetch(np.arange(1), np.zeros(1, np.int64)))[0]
    assert {id(one) for one in kept} == {
        id(one) for one in (stored.states, stored.latent, stored.source_latent)
    }
