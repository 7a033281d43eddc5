"""Every way in which an output can be not as written is found, and all of them at once."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import cli, records
from dim.errors import InputError, StorageError
from infra.storage import Store, open_store
from pipelines.outputs import manifest
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.verify import verify
from tests.pipelines.finished import edit_rows, finish

FIRST = "data/part-00000.parquet"


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")
    return open_store(uri)


def rewrite(store: Store, name: str, table: pa.Table) -> None:
    """Put another table under a name, and its size and checksum into the manifest."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    data = buffer.getvalue()
    store.write(name, data)
    change(store, name, rows=table.num_rows, bytes=len(data), sha256=records.sha256_hex(data))


def change(store: Store, name: str, **values: object) -> None:
    done = manifest.read(store)
    assert done is not None
    files = [file.model_copy(update=values) if file.path == name else file for file in done.files]
    manifest.write(store, done.model_copy(update={"files": tuple(files)}))


def read(store: Store, name: str) -> pa.Table:
    return pq.read_table(pa.BufferReader(store.read(name)))


def test_an_output_as_written_has_no_problem(store: Store) -> None:
    done = finish(store, edit_rows(20))
    assert len(done.files) == 5
    result = verify(store.uri, images=True)
    assert (result.files, result.rows, result.problems) == (5, 20, [])


def test_all_problems_are_found_in_one_go(store: Store) -> None:
    finish(store, edit_rows(30))
    data = store.read(FIRST)
    store.write(FIRST, data[:-1000] + bytes(500) + data[-500:])
    store.write("data/part-00001.parquet", b"short")
    store.delete("failed/part-00000.parquet")
    store.write("data/part-00099.parquet", data)
    problems = verify(store.uri).problems
    assert any(p == f"{FIRST}: the checksum is not the manifest's" for p in problems)
    assert any(
        p.startswith("data/part-00001.parquet: 5 bytes, the manifest says") for p in problems
    )
    assert any("failed/part-00000.parquet" in p and "not found" in p for p in problems)
    assert "data/part-00099.parquet: not in the manifest" in problems
    assert "manifest.json: 1 failed, and 0 are there" in problems


def test_rows_that_are_not_there(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(store, edit_rows(20))
    table = read(store, FIRST)
    rewrite(store, FIRST, table.slice(1))
    assert verify(store.uri).problems == ["manifest.json: 16 kept, and 15 are there"]
    change(store, FIRST, rows=table.num_rows)
    assert f"{FIRST}: 6 rows, the manifest says 7" in verify(store.uri).problems


def test_an_id_that_comes_twice(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = edit_rows(20)
    rows[11]["id"] = rows[0]["id"]
    rows[4]["id"] = rows[1]["id"]  # rejected: it may be the reason
    finish(store, rows)
    assert verify(store.uri).problems == [
        "data/part-00001.parquet: 1 ids that an earlier record has"
    ]


def test_columns_that_are_not_those_of_the_records(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(store, edit_rows(20))
    names = [FIRST, "data/part-00001.parquet", "data/part-00002.parquet"]
    for name in names:  # in all of them, so that they are alike
        rewrite(store, name, read(store, name).drop_columns("width"))
    wrong = [f"{name}: its columns are not those of edit records" for name in names]
    assert verify(store.uri).problems == wrong
    rewrite(store, FIRST, read(store, FIRST).replace_schema_metadata(None))
    assert f"{FIRST}: its schema says no kind of record" in verify(store.uri).problems


def test_columns_of_a_kind_that_is_not_known_are_the_same_in_every_file(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    features = pa.schema(
        records.EDIT, metadata={records.KIND_KEY: b"feature", records.VERSION_KEY: b"1"}
    )
    finish(store, edit_rows(20), features)
    assert verify(store.uri).problems == []
    name = "data/part-00001.parquet"
    rewrite(store, name, read(store, name).drop_columns("width"))
    (problem,) = verify(store.uri).problems
    assert problem == f"{name}: its columns are not those of the other files in data/"


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    finish(store, edit_rows(4))
    newer = {records.KIND_KEY: b"edit", records.VERSION_KEY: b"99"}
    rewrite(store, FIRST, read(store, FIRST).replace_schema_metadata(newer))
    assert any("schema version 99, and this program knows" in p for p in verify(store.uri).problems)


def test_counts_that_do_not_add_up(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    done = finish(store, edit_rows(20))
    wrong = done.counts.model_copy(
        update={"input": 21, "by_reason": {"pair.unchanged": 2, "pair.ssim_low": 2}}
    )
    manifest.write(store, done.model_copy(update={"counts": wrong}))
    problems = verify(store.uri).problems
    assert any("do not add up" in problem for problem in problems)
    was = done.counts.by_reason["pair.unchanged"]
    assert f"manifest.json: 2 rejected for pair.unchanged, and {was} are there" in problems


def test_images_are_decoded_when_asked(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    rows = edit_rows(20)
    rows[2]["image_target"] = rows[2]["image_target"][:200]
    finish(store, rows)
    assert verify(store.uri).problems == []
    (problem,) = verify(store.uri, images=True).problems
    assert problem.startswith(f"{FIRST}: 'photos-2': image_target is damaged")


def test_what_is_not_finished_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        verify(str(tmp_path / "gone"))
    store = open_store(str(tmp_path))
    store.write("data/part-00000.parquet", b"")
    with pytest.raises(InputError, match="is not finished"):
        verify(store.uri)
    store.write(manifest.NAME, b'{"version": 99, "more": 1}')
    with pytest.raises(StorageError, match="is of version 99, and this program knows 2"):
        verify(store.uri)


def test_the_command_lists_problems_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = open_store(str(tmp_path))
    finish(store, edit_rows(20))
    assert cli.execute(cli.root(), ["data", "verify", str(tmp_path)], prog_name="dim") == 0
    assert "5 files with 20 rows are as written" in capsys.readouterr().out
    store.delete(FIRST)
    store.write("rejected/other.parquet", b"")
    assert cli.execute(cli.root(), ["data", "verify", str(tmp_path)], prog_name="dim") == 1
    said = capsys.readouterr()
    assert f"{FIRST}: not found: " in said.out and "rejected/other.parquet: not in" in said.out
    assert said.err.strip().splitlines()[-1] == f"error: {tmp_path} has 3 problems"
    assert isinstance(manifest.read(store), Manifest)
