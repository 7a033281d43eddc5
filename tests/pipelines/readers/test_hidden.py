"""What is hidden is not data: among files, tables, members of tars and media; it is counted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dim import cli
from dim.errors import InputError
from infra import storage
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import names, sources
from tests.pipelines.containers import source, struct, write_lines, write_parquet, write_tar
from tests.pipelines.readers.test_containers import IMAGES, opened, read

HIDDEN = [
    ".ipynb_checkpoints/a-checkpoint.png",
    "deep/.thumbnails/x/a.png",
    ".hidden.png",
    "._a.png",
    "__MACOSX/a.png",
    "deep/__MACOSX/._a.png",
    "_temporary/0/a.png",
    "@eaDir/a.png/SYNOPHOTO_THUMB_M.jpg",
    "$RECYCLE.BIN/a.png",
]
SEEN = ["a.png", "deep/_DSC1234.jpg", "deep/..png", "_b/a.png", "a.b/c.png"]


@pytest.mark.parametrize("name", [*HIDDEN, "Thumbs.db", "deep/desktop.ini", ".DS_Store"])
def test_hidden_names(name: str) -> None:
    assert names.is_hidden(name)


@pytest.mark.parametrize("name", ["a.png", "_DSC1.jpg", "./a.png", "../a.png", "a/./b.png", "a..b"])
def test_names_that_are_not(name: str) -> None:
    assert not names.is_hidden(name)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / ".cache" / "photos"  # where the folder itself lies does not count
    for number, name in enumerate(["a.png", "deep/_DSC1234.jpg", "_b/c.png"]):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source(number))
    for name in [*HIDDEN, ".git/config", "Thumbs.db"]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(source(9))
    return folder


def test_images_of_a_folder(photos: Path, s3: str) -> None:
    made = sources.images_from_folder(str(photos), None, 2)
    rows = read(made)
    assert [row["id"] for row in rows] == ["_b/c", "a", "deep/_DSC1234"]
    assert made.identity["hidden"] == len(HIDDEN)
    storage.upload_folder(photos, f"{s3}/.x/photos")
    remote = sources.images_from_folder(f"{s3}/.x/photos", None, 2)
    assert [row["image"] for row in read(remote)] == [row["image"] for row in rows]
    assert remote.identity == made.identity


def test_a_folder_of_nothing_else_says_so(tmp_path: Path) -> None:
    (tmp_path / ".x").mkdir()
    (tmp_path / ".x" / "a.png").write_bytes(source(1))
    with pytest.raises(InputError, match=r"no images in .* \(1 that are hidden are left out\)"):
        sources.images_from_folder(str(tmp_path), None, 2)
    write_parquet(tmp_path / ".y" / "a.parquet", [{"id": "1", "image": struct(source(1))}])
    with pytest.raises(InputError, match=r"no \.parquet.* \(1 that are hidden are left out\)"):
        opened(tmp_path, IMAGES)
    assert opened(tmp_path / ".y", IMAGES).rows == 1
    assert opened(tmp_path / ".y" / "a.parquet", IMAGES).rows == 1


def test_tables_of_a_folder(tmp_path: Path) -> None:
    seen = ["a.parquet", "_year=2024/b.parquet", "deep/c.parquet"]
    hidden = [
        ".ipynb_checkpoints/a.parquet",
        "_temporary/0/a.parquet",
        "_delta_log/00.checkpoint.parquet",
        "deep/._c.parquet",
        "_metadata.parquet",
        ".cache/deep/a.parquet",
    ]
    for name in [*seen, *hidden]:
        write_parquet(tmp_path / name, [{"id": name, "image": struct(source(1))}])
    (tmp_path / "_SUCCESS").touch()
    made = opened(tmp_path, IMAGES)
    assert [row["id"] for row in read(made)] == sorted(seen)
    assert made.identity["hidden"] == len(hidden)


def test_members_of_tars(tmp_path: Path) -> None:
    members = [(name, source(9)) for name in [*HIDDEN, "Thumbs.db", "deep/.DS_Store"]]
    write_tar(tmp_path / "in" / "a.tar", [members[0], ("./1.png", source(1)), *members[1:]])
    write_tar(tmp_path / "in" / "b.tar", [("deep/_2.png", source(2)), *members])
    write_tar(tmp_path / "in" / ".b.tar", [("3.png", source(3))])
    made = opened(tmp_path / "in", IMAGES)
    rows = read(made)
    assert [(row["id"], row["image"]) for row in rows] == [
        ("a/./1", source(1)),
        ("b/deep/_2", source(2)),
    ]
    assert made.identity["hidden"] == 2 * len(members) + 1


def test_media(photos: Path, tmp_path: Path) -> None:
    lines = [{"image_path": name} for name in ["a.png", ".ipynb_checkpoints/a-checkpoint"]]
    path = write_lines(tmp_path / "list.jsonl", lines)
    write_tar(tmp_path / "tars" / "m.tar", [("a.png", source(0)), (HIDDEN[0], source(9))])
    write_parquet(tmp_path / "tables" / "m.parquet", [{"uid": "a.png", "image": struct(source(0))}])
    write_parquet(
        tmp_path / "tables" / ".x" / "m.parquet",
        [{"uid": lines[1]["image_path"], "image": struct(source(9))}],
    )
    for media, hidden in (
        ({"uri": str(photos)}, len(HIDDEN)),
        ({"uri": str(tmp_path / "tars")}, 1),
        ({"uri": str(tmp_path / "tables"), "key": "uid"}, 1),
    ):
        made = ingest.open_source(IngestConfig(out="o", images=str(path), media=media))
        good, bad = read(made)
        assert good["image"] == source(0)
        assert bad["reason"] == "record.unmatched_key"
        assert made.identity["hidden"] == hidden


@pytest.mark.usefixtures("ray_cluster")
def test_the_count_is_said_and_changes_no_finished_output(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("data", "ingest", "--images", str(photos), "--out", str(tmp_path / "raw"))

    def run() -> str:
        assert cli.execute(cli.root(), given, prog_name="dim") == 0
        return capsys.readouterr().out

    assert f"{len(HIDDEN)} hidden files were left out" in run()
    manifest = (tmp_path / "raw" / "manifest.json").read_text()
    assert f'"hidden": {len(HIDDEN)}' in manifest
    (photos / ".ipynb_checkpoints" / "b.png").write_bytes(source(8))  # a notebook is opened again
    run()
    for name in HIDDEN:
        (photos / name).unlink()
    shutil.rmtree(photos / ".ipynb_checkpoints")
    run()
    assert (tmp_path / "raw" / "manifest.json").read_text() == manifest
    given = (*given[:-1], str(tmp_path / "plain"))
    assert "hidden" not in run()
    assert "hidden" not in (tmp_path / "plain" / "manifest.json").read_text()
