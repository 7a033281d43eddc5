from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from dim import model, records
from dim.errors import InputError
from dim.model import DIM
from training.data import open_samples, read_rows
from training.features import CachedFeatures, FrozenEncoder, LiveFeatures, choose_texts

TEXTS = ["blueprint", "instruction"]
COLUMNS = ["id", "image", "image_target", *TEXTS]

warnings.filterwarnings("ignore", message="a prompt of .* tokens is longer")


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


@pytest.fixture(scope="module")
def table(edit_data: str) -> pa.Table:
    dataset, _ = open_samples([edit_data], COLUMNS)
    return read_rows(dataset, COLUMNS, np.arange(6))


@pytest.fixture(scope="module")
def cached(tiny: DIM, table: pa.Table) -> CachedFeatures:
    return CachedFeatures(encoder_of(tiny), table, TEXTS, encode_batch=4)


def encoder_of(tiny: DIM, edits: bool = True) -> FrozenEncoder:
    return FrozenEncoder(tiny, edits=edits, resolution=64)


def test_cached_and_live_features_agree(tiny: DIM, table: pa.Table, cached: CachedFeatures) -> None:
    live = LiveFeatures(encoder_of(tiny), table, TEXTS)
    rows, texts = np.array([5, 0, 3]), np.array([0, 1, 0])
    kept, fresh = cached.batch(rows, texts), live.batch(rows, texts)
    assert torch.equal(kept.mask, fresh.mask)
    for name in ("hidden_states", "latent", "source_latent"):
        one, other = getattr(kept, name), getattr(fresh, name)
        assert one.dtype == other.dtype == torch.float32
        assert torch.allclose(one, other, atol=2e-2, rtol=2e-3), name  # float16 against float32


def test_a_batch_is_padded_to_its_longest_row_only(cached: CachedFeatures) -> None:
    short = cached.batch(np.array([0]), np.array([1]))
    both = cached.batch(np.array([0, 0]), np.array([1, 0]))
    tokens = short.hidden_states.shape[1]
    assert short.mask.all() and tokens < both.hidden_states.shape[1]
    assert both.mask.sum(1).tolist() == [tokens, both.hidden_states.shape[1]]
    assert torch.equal(both.hidden_states[0, :tokens], short.hidden_states[0])
    assert not both.hidden_states[0, tokens:].any()


def test_source_and_target_are_not_mixed_up(tiny: DIM, table: pa.Table) -> None:
    latent, source = encoder_of(tiny).latents(table.slice(0, 2))
    alone, nothing = encoder_of(tiny, edits=False).latents(table.slice(0, 2))
    assert nothing is None and source is not None
    assert torch.equal(alone, source) and not torch.equal(latent, source)


def test_progress_counts_rows(tiny: DIM, table: pa.Table) -> None:
    seen: list[tuple[int, int]] = []
    CachedFeatures(
        encoder_of(tiny),
        table,
        ["instruction"],
        encode_batch=4,
        progress=lambda *at: seen.append(at),
    )
    assert seen == [(4, 6), (6, 6)]


def test_memory_and_cut_texts_are_counted(cached: CachedFeatures) -> None:
    assert cached.nbytes > 6 * 2 * 32 * 16 * 2  # more than the latents alone
    assert cached.count_cut(1) == 12 and cached.count_cut(10_000) == 0


def test_texts_are_chosen_by_their_shares() -> None:
    draws = np.linspace(0, 1, 1000, endpoint=False)
    assert np.bincount(choose_texts(draws, (0.9, 0.1))).tolist() == [900, 100]
    assert choose_texts(draws, (1.0,)).max() == 0


def test_a_broken_image_is_named(tiny: DIM, make_dataset: Callable[..., str]) -> None:
    row = {"id": "bad", "index": 0, "source": "s", "image": b"no image", "image_target": b"?"}
    row |= {"blueprint": "b", "instruction": "i"}
    dataset, _ = open_samples([make_dataset("broken", [row], records.EDIT)], COLUMNS)
    rows = read_rows(dataset, COLUMNS, np.arange(1))
    with pytest.raises(InputError, match="the image of sample bad"):
        CachedFeatures(encoder_of(tiny), rows, TEXTS)
