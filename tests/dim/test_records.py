from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import records
from dim.errors import InputError


@pytest.mark.parametrize(
    ("schema", "kind"),
    [
        (records.RAW_PAIR, "raw_pair"),
        (records.RAW_IMAGE, "raw_image"),
        (records.EDIT, "edit"),
        (records.T2I, "t2i"),
        (records.REJECT, "reject"),
        (records.FAILED, "failed"),
    ],
)
def test_kind_and_version_survive_parquet(tmp_path: Path, schema: pa.Schema, kind: str) -> None:
    pq.write_table(schema.empty_table(), tmp_path / "x.parquet")
    read = pq.read_schema(tmp_path / "x.parquet")
    assert read.equals(schema)
    assert records.kind_of(read) == kind
    assert read.metadata[records.VERSION_KEY] == b"1"
    assert records.is_same(read, schema)
    assert not records.is_same(read.remove(0), schema)
    assert not records.is_same(read.remove_metadata(), schema)


def test_edit_records_extend_raw_pairs() -> None:
    assert records.EDIT.names[: len(records.RAW_PAIR)] == records.RAW_PAIR.names
    assert "caption_hint" not in records.T2I.names


def test_unknown_schemas_have_no_kind() -> None:
    assert records.kind_of(pa.schema([("a", pa.int64())])) is None


def test_content_hash_keeps_parts_apart() -> None:
    assert records.content_hash("ab", "c") != records.content_hash("a", "bc")
    assert records.content_hash("a", None) == records.content_hash("a", "")


def test_clean_text_can_be_written() -> None:
    assert records.clean_text("a\ud83d b 🙂") == "a? b 🙂"


def test_schema_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    assert records.version_of(records.EDIT) == records.SCHEMA_VERSIONS["edit"]
    assert records.version_of(pa.schema([])) is None
    records.check_version(records.EDIT, "here")
    records.check_version(pa.schema([]), "here")
    newer = pa.schema([], metadata={records.KIND_KEY: b"t2i", records.VERSION_KEY: b"7"})
    said = "^there holds t2i records of schema version 7, and this program knows 1 and older"
    with pytest.raises(InputError, match=said):
        records.check_version(newer, "there")
    # The version of one kind says nothing of another.
    monkeypatch.setitem(records.SCHEMA_VERSIONS, "t2i", 7)
    records.check_version(newer, "there")
    monkeypatch.setitem(records.SCHEMA_VERSIONS, "t2i", 1)
    monkeypatch.setitem(records.SCHEMA_VERSIONS, "edit", 7)
    with pytest.raises(InputError, match=said):
        records.check_version(newer, "there")
    with pytest.raises(InputError, match="'x' is no number"):
        records.version_of(pa.schema([], metadata={records.VERSION_KEY: b"x"}))
