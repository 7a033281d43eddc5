from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import records


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
