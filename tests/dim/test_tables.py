"""Tables that run code when they are read: which are refused, and which are not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import tables
from dim.errors import InputError, StorageError
from tests.hostile import NOT_IN_PARQUET, nested, pickled, write

ROOT = Path(__file__).resolve().parents[2]
KINDS = sorted(nested(pickled(Path("x"))))


def open_table(path: Path) -> None:
    with pa.OSFile(str(path)) as file:
        if path.suffix == ".parquet":
            tables.open_parquet(file, str(path))
        else:
            tables.open_arrow(file, str(path))


def test_the_attack_works_on_whoever_does_not_look(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "a.parquet", {"id": pickled(marker)})
    pq.read_table(path).to_pylist()
    assert marker.exists()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_type_that_unpickles_is_refused_at_any_depth(
    kind: str, suffix: str, tmp_path: Path
) -> None:
    if suffix == ".parquet" and kind in NOT_IN_PARQUET:
        pytest.skip("Parquet has no such type")
    marker = tmp_path / "ran"
    columns = {"before": pa.array([1, 2]), "evil": nested(pickled(marker, 2))[kind]}
    path = write(tmp_path / f"a{suffix}", columns)
    wanted = rf"the column 'evil' of \S*a\{suffix} is of the extension type 'ray.data.arrow_pick"
    with pytest.raises(InputError, match=wanted) as error:
        open_table(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_a_type_is_refused_also_where_nobody_knows_it_yet(tmp_path: Path) -> None:
    files = [
        write(tmp_path / f"{kind}{suffix}", {"evil": nested(pickled(tmp_path / "ran"))[kind]})
        for kind in KINDS
        for suffix in (".parquet", ".arrow")
        # Arrow drops the name of a type that it does not know within this one, which then
        # nobody can know any more.
        if kind != "run_end_encoded" and not (suffix == ".parquet" and kind in NOT_IN_PARQUET)
    ]
    program = (
        "import sys, pyarrow as pa; from dim import tables; from dim.errors import InputError\n"
        "for path in sys.argv[1:]:\n"
        "    with pa.OSFile(path) as file:\n"
        "        opened = tables.open_parquet if path.endswith('.parquet') else tables.open_arrow\n"
        "        try: opened(file, path)\n"
        "        except InputError as error: print(error)\n"
        "assert 'ray' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, files)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = done.stdout.splitlines()
    assert len(said) == len(files) == 2 * len(KINDS) - 1 - len(NOT_IN_PARQUET)
    assert all("ray.data.arrow_pickled_object" in line for line in said)


def test_types_whose_values_are_plain_are_let_through(tmp_path: Path) -> None:
    columns = {
        "json": pa.array(['{"a": 1}'], pa.json_()),
        "uuid": pa.array([bytes(16)], pa.uuid()),
        "tensor": pa.ExtensionArray.from_storage(
            pa.fixed_shape_tensor(pa.int8(), [2]), pa.array([[1, 2]], pa.list_(pa.int8(), 2))
        ),
        "struct": pa.array([{"bytes": b"x"}]),
    }
    for suffix in (".parquet", ".arrow"):
        open_table(write(tmp_path / f"a{suffix}", columns))


def test_an_unknown_type_is_refused_by_its_name(tmp_path: Path) -> None:
    field = pa.field("box", pa.binary(), metadata={"ARROW:extension:name": "acme.box"})
    schema = pa.schema([pa.field("outer", pa.struct([field]))])
    with pytest.raises(InputError, match=r"'outer' of here is of the extension type 'acme.box'"):
        tables.check_types(schema, "here")


def test_a_schema_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    told = {"ARROW:extension:name": "ray.data.arrow_tensor_v2", "ARROW:extension:metadata": b"\x80"}
    schema = pa.schema([pa.field("t", pa.list_(pa.int64()), metadata=told)])
    table = pa.table([pa.array([[1]])], schema=schema)
    pq.write_table(table, tmp_path / "a.parquet")
    with pa.ipc.new_stream(tmp_path / "a.arrow", schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "a.arrow"):
        with pytest.raises(StorageError, match=rf"the schema of \S*{name} cannot be read"):
            open_table(tmp_path / name)


def test_nesting_has_an_end() -> None:
    kind: pa.DataType = pa.int8()
    for _ in range(100):
        kind = pa.list_(kind)
    with pytest.raises(InputError, match="'deep' of here is nested more than 64 deep"):
        tables.check_types(pa.schema([("deep", kind)]), "here")


def test_arrow_is_read_by_columns_stream_or_file(tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2], "b": ["x", "y"], "c": [1.0, 2.0]})
    for name, new in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        with new(tmp_path / name, table.schema) as writer:
            writer.write_table(table, max_chunksize=1)
        for columns, wanted in ((None, "abc"), ({"c", "a"}, "ac"), ({"z"}, "a"), (set(), "a")):
            with pa.OSFile(str(tmp_path / name)) as file:
                schema, batches = tables.open_arrow(file, name, columns)
                assert schema == table.schema
                read = pa.Table.from_batches(batches)
            assert read == table.select(list(wanted))
