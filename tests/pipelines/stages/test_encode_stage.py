from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from dim import model as models
from dim import records
from dim.errors import InputError
from dim.features.encoder import FrozenEncoder
from dim.features.format import unpack_bf16, unpack_int8
from infra.storage import open_store
from pipelines import attempts
from pipelines.ranges import Piece
from pipelines.stages.encode import EncodeFeatures, EncodeOptions
from tests.datasets import edit_rows, t2i_rows
from tests.feature_shards import encoder, pieces_in, prepare
from tests.pipelines.finished import finish

Made = tuple[EncodeFeatures, list[Piece]]


@pytest.fixture
def made(tmp_path: Path, tiny_model_dir: Path) -> Callable[..., Made]:
    """``made(rows, **options)``: the stage over these records, and their row groups."""

    def make(rows: list[dict[str, Any]], schema: pa.Schema = records.EDIT, **options: Any) -> Made:
        plain = tmp_path / "plain"
        if not plain.exists():
            finish(open_store(str(plain)), rows, schema)
        stage, _ = encoder(str(plain), tiny_model_dir, **options)
        return stage, pieces_in(open_store(str(plain)))

    return make


def run(stage: EncodeFeatures, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    return [row for piece in pieces for part in stage(piece) for row in part.to_pylist()]


def test_edits_become_what_the_frozen_parts_say(
    made: Callable[..., Made], tiny_model_dir: Path
) -> None:
    source = edit_rows(7)
    stage, pieces = made(source)
    rows = run(stage, pieces)
    assert [row["id"] for row in rows] == [row["id"] for row in source]
    assert {row["outcome"] for row in rows} == {"kept"}
    model = models.load(tiny_model_dir)
    frozen = FrozenEncoder(model, edits=True, resolution=64)
    for row, record in zip(rows, source, strict=True):
        pictures = [frozen.prepare(record)]
        seen = frozen.see(pictures)
        for text in ("blueprint", "instruction"):
            hidden, _ = frozen.states([record[text]], seen)
            assert row[text] == record[text] and row[f"{text}_tokens"] == hidden.shape[1]
            shape = (row[f"{text}_tokens"], row["hidden_size"])
            kept = unpack_bf16(row[f"{text}_states"], shape).float()
            assert torch.allclose(kept, hidden[0], rtol=2**-8, atol=1e-4)  # half a bfloat16 step
        for name, wanted in zip(("latent", "source_latent"), frozen.latents(pictures), strict=True):
            kept = unpack_bf16(row[name], tuple(row["latent_shape"])).float()
            assert wanted is not None
            assert torch.allclose(kept, wanted[0], rtol=2**-8, atol=1e-4)
    assert rows[0]["latent"] != rows[0]["source_latent"]
    assert rows[0]["provenance"] == source[0]["provenance"] and "image" not in rows[0]


def test_8_bit_states_say_how_far_they_are_off(made: Callable[..., Made]) -> None:
    exact = run(*made(edit_rows(3)))
    rough = run(*made(edit_rows(3), encoding="int8"))
    for one, other in zip(exact, rough, strict=True):
        shape = (one["blueprint_tokens"], one["hidden_size"])
        states = unpack_bf16(one["blueprint_states"], shape).float()
        kept = unpack_int8(other["blueprint_states"], other["blueprint_scales"], shape)
        apart = float((states - kept).norm() / states.norm())
        assert 0.001 < other["blueprint_error"] < 0.02
        assert apart == pytest.approx(other["blueprint_error"], rel=0.2)
        assert len(other["blueprint_states"]) * 2 == len(one["blueprint_states"])
        assert one["latent"] == other["latent"]


def test_images_have_no_source(made: Callable[..., Made]) -> None:
    stage, pieces = made(t2i_rows(2), records.T2I, kind="t2i", texts=("caption",))
    rows = run(stage, pieces)
    assert [row["outcome"] for row in rows] == ["kept", "kept"]
    assert "source_latent" not in rows[0] and rows[0]["caption_states"]


def test_a_bad_record_spoils_no_other(made: Callable[..., Made]) -> None:
    source = edit_rows(6)
    source[1]["image"] = b"no image"
    source[2]["blueprint"] = None
    source[4]["image_target"] = source[4]["image_target"][:60]
    rows = run(*made(source))
    assert [row["outcome"] for row in rows] == [
        "kept", "failed", "rejected", "kept", "failed", "kept",
    ]  # fmt: skip
    assert rows[1]["stage"] == "features" and "the image of sample edit-1" in rows[1]["error"]
    assert rows[2]["reason"] == "features.text_missing" and "blueprint" in rows[2]["detail"]
    assert "the image_target of sample edit-4" in rows[4]["error"]
    assert rows[1]["blueprint_states"] is None


def test_numbers_that_are_none_fail_their_record(made: Callable[..., Made]) -> None:
    stage, pieces = made(edit_rows(2))
    states = stage._encoder.states

    def broken(texts: list[str], seen: Any) -> Any:
        hidden, mask = states(texts, seen)
        return hidden * float("nan"), mask

    stage._encoder.states = broken  # type: ignore[method-assign]
    assert [row["error"] for row in run(stage, pieces)] == [
        "its hidden states are not finite numbers"
    ] * 2


def test_groups_are_of_similar_length(made: Callable[..., Made]) -> None:
    source = edit_rows(8)
    for number, row in enumerate(source):
        row["blueprint"] = row["instruction"] = "word " * (1 + 40 * (number % 2))
    stage, pieces = made(source)
    lengths = [
        {row["blueprint_tokens"] for row in part.to_pylist()}
        for part in stage.encode(stage._read(pieces[0]))
    ]
    assert [len(group) for group in lengths] == [1, 1]


def test_groups_are_of_records_that_are_near_and_come_in_order(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.stages.encode._GROUPS_TOGETHER", 2)
    source = edit_rows(9)
    for number, row in enumerate(source):
        row["blueprint"] = row["instruction"] = "word " * (1 + 40 * (number % 2))
    source[5]["blueprint"] = None
    stage, pieces = made(source, encode_batch=2)
    seen: list[list[str]] = []
    encode = stage._features

    def noted(table: pa.Table) -> list[dict[str, Any]]:
        seen.append(table["id"].to_pylist())
        return encode(table)

    stage._features = noted  # type: ignore[method-assign]
    parts = [part["id"].to_pylist() for piece in pieces for part in stage(piece)]
    assert parts == [[f"edit-{n}" for n in some] for some in ((0, 1, 2, 3), (4, 5, 6, 7), (8,))]
    assert [[int(id.removeprefix("edit-")) for id in group] for group in seen] == [
        [0, 2], [1, 3], [4, 6], [7], [8],
    ]  # fmt: skip


def test_a_model_that_is_another_one_on_the_workers_machine(
    made: Callable[..., Made], tmp_path: Path, tiny_model_dir: Path
) -> None:
    stage, _ = made(edit_rows(1))
    needed = prepare(tiny_model_dir).model_copy(update={"autoencoder": "0" * 64})
    store = open_store(str(tmp_path / "out"))
    options = EncodeOptions.model_validate(stage.options.model_dump())
    with pytest.raises(InputError, match="is not the same on every machine: the weights or the"):
        EncodeFeatures(str(tiny_model_dir), options, needed, store, False, 1)


def test_a_unit_that_no_process_survives_is_failed_records(
    made: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, pieces = made(edit_rows(3))
    monkeypatch.setattr(attempts, "attempt", lambda: attempts.MOST_ATTEMPTS)
    rows = run(stage, pieces)
    assert [row["id"] for row in rows] == [row["id"] for row in edit_rows(3)]
    assert {row["outcome"] for row in rows} == {"failed"}
    assert {row["stage"] for row in rows} == {"features"} and "ended 4 times" in rows[0]["error"]
