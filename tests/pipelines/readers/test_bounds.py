"""A few bytes that stand for many: no more of them is read than is allowed, in any container."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim.errors import InputError
from infra import storage
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import bounds, sources
from pipelines.readers.join import MediaConfig
from pipelines.readers.layout import Layout
from pipelines.readers.media import Media
from tests.image_server import ok, serving
from tests.pipelines.containers import IMAGE, source, struct, target, write_lines, write_tar
from tests.pipelines.readers.test_containers import IMAGES, PAIRS, read
from tests.pipelines.samples import read_here

MOST = 20_000  # more than the small pictures have
BIG = bytes(30_000)
ROOT = Path(__file__).resolve().parents[3]


def opened(uri: Path, layout: Layout = IMAGES, **more: Any) -> list[dict[str, Any]]:
    return read(sources.from_records(str(uri), layout, None, 4, max_bytes=MOST, **more))


def rejected(rows: list[dict[str, Any]]) -> list[str | None]:
    return [row["reason"] for row in rows]


def check_rejected(row: dict[str, Any], name: str, size: int = len(BIG)) -> None:
    assert (row["outcome"], row["reason"]) == ("rejected", "image.too_many_bytes")
    assert row["detail"] == f"{name} has {size:,} bytes, and max_bytes is 20,000"
    assert (row["value"], row["threshold"]) == (size, MOST)
    assert row["image"] is None


# --- tars


def member(data: bytes, name: str = "a.png") -> bytes:
    """A file as it lies in a tar."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    return header.tobuf(tarfile.GNU_FORMAT) + data.ljust(-(-len(data) // 512) * 512, b"\0")


def sparse_gnu(name: str, size: int) -> bytes:
    """A file of ``size`` bytes of which 512 are there, in the old form of GNU tar."""
    info = tarfile.TarInfo(name)
    info.size, info.type = 512, tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" + b"00000001000\0"
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + b"x" * 512


def sparse_pax(name: str, size: int) -> bytes:
    """The same in the form 1.0 that a pax header announces."""
    info = tarfile.TarInfo(name)
    info.pax_headers = {
        "GNU.sparse.major": "1",
        "GNU.sparse.minor": "0",
        "GNU.sparse.name": name,
        "GNU.sparse.realsize": str(size),
    }
    data = b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512
    info.size = len(data)
    return info.tobuf(tarfile.PAX_FORMAT) + data


@pytest.mark.parametrize("make", [sparse_gnu, sparse_pax])
def test_a_sparse_member_is_refused(make: Callable[[str, int], bytes], tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    path.write_bytes(member(source(0)) + make("b.png", 10**12) + bytes(1024))
    with tarfile.open(path) as tar:
        assert [(each.size, each.issparse()) for each in tar][1] == (10**12, True)
    kept, failed = opened(path)
    assert kept["outcome"] == "kept"
    assert failed["outcome"] == "failed"
    assert failed["error"] == "sample b of in.tar: b.png is damaged: it is sparse"


def test_a_large_member_is_not_read(tmp_path: Path) -> None:
    members = [
        ("a.png", source(0)),
        ("b.png", BIG),
        ("c.png", source(1)),
        ("c.mp4", BIG),  # nothing of ours, and not looked at
        ("d.json", b'{"caption": "' + b"x" * 30_000 + b'"}'),
        ("d.png", source(2)),
    ]
    rows = opened(write_tar(tmp_path / "in.tar", members))
    assert [row["outcome"] for row in rows] == ["kept", "rejected", "kept", "failed"]
    check_rejected(rows[1], "b.png")
    assert "d.json has 30,015 bytes, and max_bytes is 20,000" in rows[3]["error"]


def test_a_sample_is_no_more_than_the_columns_that_are_read(tmp_path: Path) -> None:
    """However many files and keys it has."""
    members = [("a.png", source(0)), ("a.json", b'{"caption": "x", "more": "y"}'), ("a.txt", b"t")]
    members += [(f"a.view{n}.png", source(1)) for n in range(50)]
    path = write_tar(tmp_path / "in.tar", members)
    made = sources.from_records(str(path), Layout(image=("image",), caption=("caption",)), None, 4)
    (entry,) = made.reader.entries.of(made.ranges[0])  # type: ignore[attr-defined]
    assert entry.values == {"image": source(0), "caption": "x"}


def test_a_header_that_is_said_to_go_on_and_on_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    long = tarfile.TarInfo("b.png")
    long.size, long.type = 8 << 30, tarfile.XHDTYPE
    path.write_bytes(member(source(0)) + long.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    rows = opened(path)
    assert [row["outcome"] for row in rows] == ["kept", "failed"]
    assert "in.tar is damaged from byte" in rows[1]["error"]
    with pa.OSFile(str(path)) as file:
        reader = bounds.TarReader(file, 1000)
        assert len(reader.read(1000)) == 1000
        for size in (1001, -1, None):
            with pytest.raises(tarfile.ReadError):
                reader.read(size)


def test_a_sparse_map_that_holds_no_numbers_ends_the_tar_there(tmp_path: Path) -> None:
    path = tmp_path / "in.tar"
    attack = sparse_pax("b.png", 10).replace(b"1\n0\n512\n", b"x\ny\nzzz\n")
    path.write_bytes(member(source(0)) + attack + bytes(1024))
    rows = opened(path)
    assert [row["outcome"] for row in rows] == ["kept", "failed"]
    assert "in.tar is damaged from byte" in rows[1]["error"]


def test_members_that_records_name_are_measured_too(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    tar = member(source(0)) + member(BIG, "b.png") + sparse_gnu("c.png", 10**12) + bytes(1024)
    (tmp_path / "m" / "in.tar").write_bytes(tar)
    lines = write_lines(tmp_path / "l.jsonl", [{"image": name} for name in "abc"])
    kept, large, sparse = opened(lines, media=MediaConfig(uri=str(tmp_path / "m")))
    assert kept["outcome"] == "kept"
    check_rejected(large, "b.png")
    assert sparse["outcome"] == "failed" and "it is sparse" in sparse["error"]


# --- tables


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    table = pa.table(columns)
    if path.suffix == ".parquet":
        pq.write_table(table, path, compression="zstd")
    else:
        with pa.ipc.new_stream(path, table.schema) as writer:
            writer.write_table(table)
    return path


def images(kind: str) -> pa.Array:
    """A small image and a large one, as a column of one of the types that can hold them."""
    small, large = source(0), BIG
    if kind == "struct":
        return pa.array([struct(small, "a.png"), struct(large, "b.png")], IMAGE)
    if kind == "dictionary":
        return pa.array([small, large], pa.binary()).dictionary_encode()
    if kind == "bytes of one":  # a list of numbers, each of which would be a Python object
        return pa.array([list(small), list(large)], pa.list_(pa.uint8()))
    if kind == "list":
        return pa.array([[small], [large]], pa.list_(pa.binary()))
    return pa.array([small, large], getattr(pa, kind)())


KINDS = ["binary", "large_binary", "struct", "list", "dictionary", "bytes of one"]


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        *((".parquet", kind) for kind in KINDS),
        *((".arrow", kind) for kind in KINDS),
        (".arrow", "binary_view"),
    ],
)
def test_a_large_cell_is_not_read(suffix: str, kind: str, tmp_path: Path) -> None:
    columns = {"id": ["a", "b"], "image": images(kind)}
    first, second = opened(write_table(tmp_path / f"in{suffix}", columns))
    if kind == "bytes of one":
        assert first["image"] is None  # that is no form of an image
    else:
        assert (first["outcome"], first["image"]) == ("kept", source(0))
    check_rejected(second, "'image'")
    assert second["id"] == "b"


def test_large_cells_of_media_and_of_texts(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    write_table(tmp_path / "m" / "m.parquet", {"key": ["a", "b"], "image": images("binary")})
    media = MediaConfig(uri=str(tmp_path / "m"), key="key")
    lines = write_lines(tmp_path / "l.jsonl", [{"image": "a"}, {"image": "b"}])
    kept, large = opened(lines, media=media)
    assert kept["outcome"] == "kept"
    check_rejected(large, "'image'")
    pair = {"image": [source(0)], "image_target": [target(0)], "instruction": ["x" * 30_000]}
    (row,) = opened(write_table(tmp_path / "p.parquet", pair), PAIRS)
    check_rejected(row, "'instruction'")


# What a process needs at most while it reads a file, in ranges of 2**20 bytes.
PEAK = """
import json, resource, sys
from pipelines.readers import sources
from pipelines.readers.layout import load_layout
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
layout = load_layout("images", pairs=False)
try:
    made = sources.from_records(sys.argv[1], layout, None, 512)
    rows = [row for each in made.ranges for part in made.reader.parts(each)
            for row in made.reader.table(part).to_pylist()]
    said = sorted({row["reason"] or row["error"] for row in rows})
except Exception as error:
    said = [str(error)]
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([(after - before) / 1024, said]))
"""


def peak(path: Path) -> tuple[float, list[str]]:
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    used, said = json.loads(done.stdout)
    return used, said


def test_a_small_table_of_a_picture_in_many_rows_needs_little_memory(tmp_path: Path) -> None:
    """8 kB on disk; 16 rows at a time would need 2.9 GB."""
    value = bytes(60_000_000)
    column = pa.array([value] * 30, pa.binary())
    path = write_table(tmp_path / "in.parquet", {"image": column})
    del column
    assert path.stat().st_size < 20_000
    used, said = peak(path)
    assert said == ["image.too_many_bytes"]
    assert used < 700


def test_a_small_table_of_a_long_id_in_many_rows_needs_little_memory(tmp_path: Path) -> None:
    """As the driver reads it, which reads all ids."""
    places = pa.array([0] * 20_000, pa.int32())
    ids = pa.DictionaryArray.from_arrays(places, pa.array(["x" * 60_000_000]))
    columns = {"id": ids, "image": pa.array([b"x"] * 20_000)}
    for suffix in (".parquet", ".arrow"):
        path = write_table(tmp_path / f"in{suffix}", columns)
        used, (said,) = peak(path)
        assert said == (
            f"the column 'id' of {path} has a value of 60,000,000 bytes, and a key may have 65,536"
        )
        assert used < 700


def test_more_rows_than_bytes_are_not_believed(tmp_path: Path) -> None:
    rows = 3_000_000
    for columns in (
        {"id": pa.nulls(rows, pa.string()), "image": pa.nulls(rows, pa.binary())},
        {"image": pa.nulls(rows, pa.binary())},
    ):
        path = write_table(tmp_path / "in.parquet", columns)
        with pytest.raises(InputError, match=r"in.parquet says it has [\d,]+ rows or more, in "):
            opened(path)


def test_a_footer_that_promises_too_much_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "_OF_A_CHUNK", 0)
    columns = {"image": pa.array([b"\0" * 50_000, source(0)]), "other": [BIG * 9, BIG * 9]}
    rows = opened(write_table(tmp_path / "in.parquet", columns))
    assert [row["outcome"] for row in rows] == ["failed"] * 2
    assert "the column 'image' of" in rows[0]["error"]
    assert "in a row group of 2, and max_bytes is 20,000" in rows[0]["error"]


def test_images_in_a_table_are_held_by_bytes_and_not_only_by_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.readers import records

    column = pa.array([struct(source(n)) for n in range(8)], IMAGE)
    path = write_table(tmp_path / "in.parquet", {"image": column})
    made = sources.from_records(str(path), IMAGES, None, 8)
    (each,) = made.ranges

    def sizes() -> list[int]:
        return [table.num_rows for table in read_here(made, each)]

    assert sizes() == [8]
    monkeypatch.setattr(records, "_BYTES_PER_PART", 2 * len(source(0)))
    assert sum(sizes()) == 8 and max(sizes()) <= 4


# --- files and URLs


def test_large_files_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(source(0))
    (tmp_path / "in" / "b.png").write_bytes(BIG)
    kept, large = read(sources.images_from_folder(str(tmp_path / "in"), None, 4, MOST))
    assert kept["outcome"] == "kept"
    check_rejected(large, f"{tmp_path}/in/b.png")
    lines = [{"image": "in/a.png"}, {"image": "in/b.png"}]
    kept, large = opened(write_lines(tmp_path / "l.jsonl", lines))
    assert kept["outcome"] == "kept"
    check_rejected(large, f"{tmp_path}/in/b.png")
    media = MediaConfig(uri=str(tmp_path / "in"))
    lines = write_lines(tmp_path / "m.jsonl", [{"image": "a"}, {"image": "b"}])
    kept, large = opened(lines, media=media)
    assert kept["outcome"] == "kept"
    check_rejected(large, f"{tmp_path}/in/b.png")


def test_large_objects_are_not_read(s3: str) -> None:
    store = storage.open_store(s3)
    store.write("a.png", source(0))
    store.write("b.png", BIG)
    kept, large = read(sources.images_from_folder(s3, None, 4, MOST))
    assert kept["outcome"] == "kept"
    check_rejected(large, f"{s3}/b.png")


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    rows = opened(write_lines(tmp_path / "l.jsonl", [{"image": "a.png"}, {"image": "b.png"}]))
    assert [row["outcome"] for row in rows] == ["failed"] * 2
    assert "'a.png' is no file but a device or a pipe" in rows[0]["error"]
    assert "'b.png' is a link that leads out of" in rows[1]["error"]


def test_a_url_is_held_to_the_smaller_of_both_limits(tmp_path: Path) -> None:
    with serving() as server:
        server.answers = {"/a": ok(source(0)), "/b": ok(BIG)}
        lines = write_lines(
            tmp_path / "l.jsonl", [{"image": f"{server.url}/{name}"} for name in "ab"]
        )
        fetch = {"allow_private": True, "workers": 1, "per_host_per_second": 1000}
        for limits, wanted in (
            ({"max_bytes": MOST}, [None, "url.too_large"]),
            ({"fetch": {"max_bytes": MOST}}, [None, "url.too_large"]),
            ({"max_bytes": MOST, "fetch": {"max_bytes": 100}}, ["url.too_large"] * 2),
            ({}, [None, "image.undecodable"]),
        ):
            chosen = {**limits, "fetch": {**fetch, **limits.get("fetch", {})}}
            config = IngestConfig(out="o", images=str(lines), **chosen)
            assert rejected(read(ingest.open_source(config))) == wanted


# --- the setting


@pytest.mark.usefixtures("ray_cluster")
def test_the_setting_reaches_every_reader_and_old_outputs_stay_what_they_are(
    tmp_path: Path,
) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(source(0))
    (tmp_path / "in" / "b.png").write_bytes(BIG)
    config = IngestConfig(images=str(tmp_path / "in"), out=str(tmp_path / "out"), max_bytes=MOST)
    counts = ingest.run(config).counts
    assert counts.kept == 1 and counts.by_reason == {"image.too_many_bytes": 1}
    with pytest.raises(InputError, match="made otherwise .max_bytes was 20000 and is None"):
        ingest.run(config.model_copy(update={"max_bytes": None}))

    config = config.model_copy(update={"max_bytes": None, "out": str(tmp_path / "old")})
    done = ingest.run(config)
    path = tmp_path / "old" / "manifest.json"
    told = json.loads(path.read_text())
    assert told["config"].pop("max_bytes", 0) is None  # as it was before there was the setting
    path.write_text(json.dumps(told))
    assert ingest.run(config).files == done.files


def test_inline_bytes_of_a_line_are_measured(tmp_path: Path) -> None:
    made = sources.from_records(
        str(write_lines(tmp_path / "l.jsonl", [{"image": "x"}])), IMAGES, None, 4, max_bytes=10
    )
    entry = next(iter(made.reader.entries.of(made.ranges[0])))  # type: ignore[attr-defined]
    entry.values = {"image": {"bytes": source(0), "path": None}}
    row = made.reader._read(entry, {})  # type: ignore[attr-defined]
    assert row["reason"] == "image.too_many_bytes"
    assert row["detail"] == f"'image' has {len(source(0)):,} bytes, and max_bytes is 10"


def test_media_give_the_reason_and_not_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(BIG)
    media = Media("m", storage.open_store(str(tmp_path)), ("image",), max_bytes=MOST)
    found = media.read({"a": ("a.png", 0), "b": ("gone.png", 0)})
    assert getattr(found["a"], "reason", None) == "image.too_many_bytes"
    assert isinstance(found["b"], InputError)
