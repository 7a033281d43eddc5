"""Names in data: what they may lead to, attacks that are made, and other systems' spellings."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pytest

from dim.errors import InputError
from infra import storage
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import addresses
from tests.image_server import ok, serving
from tests.pipelines.containers import (
    source,
    struct,
    target,
    write_lines,
    write_parquet,
    write_tar,
)
from tests.pipelines.readers.test_containers import read

Row = dict[str, Any]


def pair(image: Any) -> Row:
    return {"image": image, "image_target": "t.png", "instruction": "Add a box."}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder of data with two images, beside one with an image that is not the data's."""
    home = tmp_path / "home"
    (home / "image").mkdir(parents=True)
    (home / "image" / "a.png").write_bytes(source(1))
    (home / "t.png").write_bytes(target(1))
    (tmp_path / "home-of-others").mkdir()
    (tmp_path / "home-of-others" / "secret.png").write_bytes(source(9))
    return home


def ingested(home: Path, *images: Any, **more: Any) -> list[Row]:
    path = write_lines(home / "pairs.jsonl", [pair(image) for image in images])
    return read(ingest.open_source(IngestConfig(out="o", pairs=str(path), **more)))


def refused(row: Row) -> str:
    assert row["outcome"] == "failed" and row["image"] is None, row
    assert "\n" not in row["error"] and len(row["error"]) < 700
    return str(row["error"])


def in_lines(home: Path, image: str) -> Path:
    return write_lines(home / "pairs.jsonl", [pair(image)])


def in_a_struct(home: Path, image: str) -> Path:
    row = {**pair(None), "image": struct(None, image)}
    return write_parquet(home / "pairs.parquet", [row])


def in_arrow(home: Path, image: str) -> Path:
    table = pa.Table.from_pylist([pair(image)])
    with (
        pa.OSFile(str(home / "pairs.arrow"), "wb") as file,
        pa.ipc.new_stream(file, table.schema) as to,
    ):
        to.write_table(table)
    return home / "pairs.arrow"


def in_a_tar(home: Path, image: str) -> Path:
    return write_tar(home / "pairs.tar", [("1.json", json.dumps(pair(image)).encode())])


@pytest.mark.parametrize("write", [in_lines, in_a_struct, in_arrow, in_a_tar])
@pytest.mark.parametrize(
    "attack",
    [
        "{out}/secret.png",
        "file://{out}/secret.png",
        "FILE:{out}/secret.png",
        "file://localhost{out}/secret.png",
        "../home-of-others/secret.png",
        "image/../../home-of-others/secret.png",
        "..\\home-of-others\\secret.png",
        "%2e%2e/home-of-others/secret.png",
        "link.png",
        "linked/secret.png",
    ],
)
def test_no_name_in_data_leads_out_of_their_folder(
    attack: str, write: Callable[[Path, str], Path], home: Path
) -> None:
    outside = home.parent / "home-of-others"
    (home / "link.png").symlink_to(outside / "secret.png")
    (home / "linked").symlink_to(outside)
    path = write(home, attack.format(out=outside))
    (row,) = read(ingest.open_source(IngestConfig(out="o", pairs=str(path))))
    error = refused(row)
    assert "leads out of" in error and f"read_from=[{outside}]" in error
    assert error.startswith(("line 1: ", "row 0 of pairs.", "sample 1 of pairs.tar: "))
    told = IngestConfig(out="o", pairs=str(path), read_from=(str(outside),))
    (row,) = read(ingest.open_source(told))
    assert (row["outcome"], row["image"]) == ("kept", source(9))


def test_a_root_is_compared_part_by_part_and_not_as_a_text(home: Path) -> None:
    secret = str(home.parent / "home-of-others" / "secret.png")
    row, *_ = ingested(home, secret, read_from=(str(home),))
    assert "leads out of" in refused(row)


def test_no_record_chooses_the_host_of_a_store(home: Path, s3: str) -> None:
    """The address would send a request that is signed with the job's keys."""
    with serving() as server:
        server.answers = {"/bucket/key.png": ok(source(1))}
        bucket = s3.removeprefix("s3://")
        attacks = [
            f"s3://bucket/key.png?endpoint_override={server.url}",
            f"S3://bucket/key.png?endpoint_override={server.url}&scheme=http",
            f"{s3}/key.png?endpoint_override={server.url}",
            f"key.png?endpoint_override={server.url}",
            f"s3:///{bucket}/key.png?region=%0d%0a",
        ]
        rows = ingested(home, *attacks, read_from=(s3, "s3://bucket"))
        for row in rows:
            refused(row)
        assert all("has options" in row["error"] for row in (*rows[:3], rows[4]))
        assert not server.asked


def test_what_s3_address_a_record_may_have(s3: str, home: Path) -> None:
    for name in ("data/image/a.png", "data-of-others/a.png"):
        storage.write_bytes(f"{s3}/{name}", source(1))
    storage.write_bytes(f"{s3}/data/t.png", target(1))
    images = [
        "image/a.png",
        f"{s3}/data/image/a.png",
        f"{s3}/data/../data-of-others/a.png",
        "../data-of-others/a.png",
        f"{s3}/data-of-others/a.png",
        "s3://elsewhere/a.png",
        "/etc/hostname",
        f"{s3}@host/a.png".replace("s3://", "s3://user:word@"),
        "image\\a.png",
    ]
    lines = "".join(json.dumps(pair(image)) + "\n" for image in images)
    storage.write_bytes(f"{s3}/data/pairs.jsonl", lines.encode())
    rows = read(ingest.open_source(IngestConfig(out="o", pairs=f"{s3}/data/pairs.jsonl")))
    assert [row["outcome"] for row in rows] == ["kept"] * 2 + ["failed"] * 6 + ["kept"]
    assert all("leads out of" in refused(row) for row in rows[2:8])
    assert f"read_from=[{s3}/data-of-others]" in rows[3]["error"]
    assert "word" not in rows[7]["error"]
    rows = read(
        ingest.open_source(
            IngestConfig(
                out="o", pairs=f"{s3}/data/pairs.jsonl", read_from=(f"{s3}/data-of-others",)
            )
        )
    )
    assert [row["outcome"] for row in rows] == ["kept"] * 5 + ["failed"] * 3 + ["kept"]


def test_addresses_of_other_kinds_and_names_that_are_none(home: Path) -> None:
    os.mkfifo(home / "pipe.png")
    images = ["gs://b/a.png", "hf://a", "file://host/a.png", "a\0b", ".", "pipe.png", "x" * 5000]
    errors = [refused(row) for row in ingested(home, *images)]
    assert all("is no address that data may have" in error for error in errors[:3])
    assert all("cannot be the name of a file" in error for error in (*errors[3:5], errors[6]))
    assert "a device or a pipe" in errors[5]


def test_the_paths_of_ones_own_folder_in_full(home: Path) -> None:
    elsewhere = home.parent / "also-home"
    elsewhere.symlink_to(home)
    images = [home / "image" / "a.png", elsewhere / "image" / "a.png"]
    for given in (home, elsewhere):
        rows = ingested(given, str(given / "image" / "a.png"), (home / "image" / "a.png").as_uri())
        assert [row["outcome"] for row in rows] == ["kept"] * 2
    assert [row["outcome"] for row in ingested(elsewhere, *map(str, images))] == ["kept"] * 2


def test_links_within_the_folder_are_followed_and_a_loop_ends(home: Path) -> None:
    (home / "alias.png").symlink_to("image/a.png")
    (home / "image" / "loop").symlink_to("..")
    (home / "image" / "self").symlink_to(".")
    (home / "broken.png").symlink_to("nowhere")
    rows = read(ingest.open_source(IngestConfig(out="o", images=str(home))))
    assert [(row["id"], row["outcome"]) for row in rows] == [
        ("alias", "kept"),
        ("broken", "failed"),
        ("image/a", "kept"),
        ("t", "kept"),
    ]
    assert "not found" in rows[1]["error"]


def test_links_in_a_folder_of_images_lead_nowhere_else(home: Path) -> None:
    outside = home.parent / "home-of-others"
    (home / "link.png").symlink_to(outside / "secret.png")
    (home / "linked").symlink_to(outside)
    rows = read(ingest.open_source(IngestConfig(out="o", images=str(home))))
    assert {row["id"]: row["outcome"] for row in rows} == {
        "image/a": "kept",
        "link": "failed",
        "linked": "failed",
        "t": "kept",
    }
    assert all("leads out of" in row["error"] for row in rows if row["outcome"] == "failed")
    told = IngestConfig(out="o", images=str(home), read_from=(str(outside),))
    rows = read(ingest.open_source(told))
    assert [row["id"] for row in rows] == ["image/a", "link", "linked/secret", "t"]
    assert {row["outcome"] for row in rows} == {"kept"}


def test_links_to_tables_and_media_lead_nowhere_else(home: Path) -> None:
    outside = home.parent / "home-of-others"
    write_parquet(outside / "b.parquet", [{"image": struct(source(1)), "uid": "k"}])
    (home / "tables").mkdir()
    write_parquet(home / "tables" / "a.parquet", [{"image": struct(source(1)), "uid": "j"}])
    (home / "tables" / "b.parquet").symlink_to(outside / "b.parquet")
    good, bad = read(ingest.open_source(IngestConfig(out="o", images=str(home / "tables"))))
    assert good["outcome"] == "kept" and "'b.parquet' is a link that leads out" in refused(bad)
    path = write_lines(home / "list.jsonl", [{"image_path": "k"}])
    media = {"uri": str(home / "tables"), "key": "uid"}
    with pytest.raises(InputError, match=r"'b\.parquet' is a link that leads out"):
        ingest.open_source(IngestConfig(out="o", images=str(path), media=media))
    (home / "image" / "b.png").symlink_to(outside / "secret.png")
    media = {"uri": str(home / "image")}
    with pytest.raises(InputError, match=r"'b\.png' is a link that leads out"):
        ingest.open_source(IngestConfig(out="o", images=str(path), media=media))


def test_a_snapshot_of_the_hub_consists_of_links_to_the_blobs_beside_it(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "1234"
    snapshot.mkdir(parents=True)
    write_parquet(blobs / "f00", [{"image": struct(None, "x.png"), "id": "1"}])
    (blobs / "f01").write_bytes(source(2))
    (snapshot / "a.parquet").symlink_to("../../blobs/f00")
    (snapshot / "x.png").symlink_to("../../blobs/f01")
    (row,) = read(ingest.open_source(IngestConfig(out="o", images=str(snapshot))))
    assert row["image"] == source(2)
    blobs.rename(tmp_path / "elsewhere")
    blobs.symlink_to("elsewhere")
    (row,) = read(ingest.open_source(IngestConfig(out="o", images=str(snapshot))))
    assert "leads out of" in refused(row)


def test_paths_in_media_are_relative_to_the_media_and_bounded_too(home: Path) -> None:
    media = home.parent / "media"
    rows = [
        {"uid": "good", "image": struct(None, "bad")},
        {"uid": "bad", "image": struct(None, "../home-of-others/secret.png")},
    ]
    write_parquet(media / "m.parquet", rows)
    (media / "bad").write_bytes(source(4))  # called as another record's key is
    path = write_lines(home / "list.jsonl", [{"image_path": "good"}, {"image_path": "bad"}])
    config = IngestConfig(out="o", images=str(path), media={"uri": str(media), "key": "uid"})
    good, bad = read(ingest.open_source(config))
    assert good["image"] == source(4)
    assert "leads out of" in refused(bad)


@pytest.mark.parametrize("name", ["../other.arrow", "/etc/hostname", "sub/x.arrow", 7])
def test_a_state_names_files_beside_it(name: Any, tmp_path: Path) -> None:
    in_arrow(tmp_path, "a.png")
    state = {"_data_files": [{"filename": name}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(InputError, match=r"state\.json names a file that is not beside it"):
        ingest.open_source(IngestConfig(out="o", pairs=str(tmp_path)))


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ('{"_data_files": [{"filename": "gone.arrow"}]}', r"lacks gone\.arrow, which its state"),
        ('{"_data_files": [7]}', "does not name its files as save_to_disk does"),
        ("{", r"state\.json is not JSON"),
    ],
)
def test_a_state_that_is_wrong_is_one_sentence(state: str, complaint: str, tmp_path: Path) -> None:
    in_arrow(tmp_path, "a.png")
    (tmp_path / "state.json").write_text(state)
    with pytest.raises(InputError, match=complaint):
        ingest.open_source(IngestConfig(out="o", pairs=str(tmp_path)))


NFC, NFD = (unicodedata.normalize(form, "é bé.png") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(
    "name",
    [
        "image\\a.png",
        ".\\image\\a.png",
        "./image//a.png",
        "image/./a.png",
        "Image/A.PNG",
        "IMAGE\\a.PNG",
        "image%2Fa.png",
        "image%5ca.png",
    ],
)
def test_a_name_as_another_system_wrote_it(name: str, home: Path) -> None:
    (row,) = ingested(home, name)
    assert (row["outcome"], row["image"]) == ("kept", source(1)), row["error"]
    assert json.loads(row["provenance"])["image_path"] == name


@pytest.mark.parametrize(("there", "named"), [(NFC, NFD), (NFD, NFC)])
def test_accents_that_are_letters_of_their_own(there: str, named: str, home: Path) -> None:
    (home / "image" / there).write_bytes(source(3))
    names = [
        f"image/{named}",
        f"image\\{named}",
        f"IMAGE/{named.upper()}",
        f"image/{named}".replace(" ", "%20"),
    ]
    for row in ingested(home, *names):
        assert (row["outcome"], row["image"]) == ("kept", source(3)), row["error"]


def test_the_very_name_comes_first_and_two_that_fit_are_refused(home: Path) -> None:
    folder = home / "image"
    (folder / "x.png").write_bytes(source(3))
    (folder / "X.png").write_bytes(source(4))
    (home / "image\\a.png").write_bytes(source(5))
    (home / "image\\b.png").write_bytes(source(6))
    exact, other, several, literal = ingested(
        home, "image/x.png", "image/X.png", "IMAGE/x.PNG", "image\\a.png"
    )
    assert (exact["image"], other["image"]) == (source(3), source(4))
    assert "'IMAGE/x.PNG' fits 2 files: image/X.png and image/x.png" in refused(several)
    assert literal["image"] == source(5)
    (folder / NFC).write_bytes(source(7))
    (folder / NFD).write_bytes(source(8))
    mixed = unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", " bé.png")
    composed, decomposed, neither = ingested(home, *(f"image/{n}" for n in (NFC, NFD, mixed)))
    assert (composed["image"], decomposed["image"]) == (source(7), source(8))
    assert "fits 2 files" in refused(neither)


def test_paths_of_another_machine_say_so(home: Path) -> None:
    (home / "a.png").write_bytes(source(1))
    for row in ingested(home, "C:\\data\\a.png", "d:/data/a.png", "\\\\server\\share\\a.png"):
        assert "is a path of another machine: names must be relative to" in refused(row)
    (row,) = ingested(home, "gone.png")
    assert refused(row) == f"line 1: not found: {home}/gone.png"


def test_a_very_large_folder_is_not_searched_for_other_letters(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(addresses, "_MOST_ENTRIES", 1)
    (home / "image" / "b.png").write_bytes(source(2))
    wrong, right = ingested(home, "image/A.png", "image\\a.png")
    assert "not found" in refused(wrong) and right["outcome"] == "kept"


def test_keys_of_media_in_another_spelling(home: Path) -> None:
    members = [
        ("./" + NFD, source(3)),
        ("win\\1.png", source(4)),
        ("b/2.png", source(5)),
        (f"two/{NFC}", source(6)),
        (f"two/{NFD}", source(7)),
    ]
    write_tar(home / "tars" / "m.tar", members)
    mixed = "two/" + unicodedata.normalize("NFC", "é") + unicodedata.normalize("NFD", " bé.png")
    names = [NFC, "win/1.png", "b\\2.png", ".\\b\\2.png", f"two/{NFC}", mixed]
    path = write_lines(home / "list.jsonl", [{"image_path": name} for name in names])
    made = ingest.open_source(
        IngestConfig(out="o", images=str(path), media={"uri": str(home / "tars")})
    )
    rows = read(made)
    assert [row["image"] for row in rows[:5]] == [source(n) for n in (3, 4, 5, 5, 6)]
    assert rows[5]["reason"] == "record.unmatched_key"
    assert "several images of" in rows[5]["detail"]
    assert (made.identity["keys_unmatched"], made.identity["images_unused"]) == (1, 1)


def test_a_short_name_of_two_images_of_the_media_is_neither(home: Path) -> None:
    folder = home.parent / "media"
    folder.mkdir()
    for name, number in (("cat.jpg", 1), ("cat.png", 2), ("dog.png", 3)):
        (folder / name).write_bytes(source(number))
    names = ["cat.jpg", "cat.png", "cat", "dog"]
    path = write_lines(home / "list.jsonl", [{"image_path": name} for name in names])
    config = IngestConfig(out="o", images=str(path), media={"uri": str(folder)})
    rows = read(ingest.open_source(config))
    assert [row["image"] for row in rows] == [source(1), source(2), None, source(3)]
    assert "several images of" in rows[2]["detail"] and "'cat'" in rows[2]["detail"]


def test_a_sample_in_media_goes_by_its_one_image_or_by_that_which_is_plainly_it(
    home: Path,
) -> None:
    members = [
        ("1.mask.png", source(1)),
        ("1.png", source(2)),
        ("2.depth.png", source(3)),
        ("3.a.png", source(4)),
        ("3.b.png", source(5)),
    ]
    write_tar(home / "tars" / "m.tar", members)
    lines = [{"image_path": name} for name in ("1", "2", "3", "3.a.png")]
    path = write_lines(home / "list.jsonl", lines)
    media = {"uri": str(home / "tars")}
    rows = read(ingest.open_source(IngestConfig(out="o", images=str(path), media=media)))
    assert [row["image"] for row in rows] == [source(2), source(3), None, source(4)]


def test_a_path_that_two_tars_have_leads_to_neither_and_a_key_to_the_first(home: Path) -> None:
    for name, number in (("a.tar", 1), ("b.tar", 2)):
        members = [("1.png", source(number)), ("1.json", b'{"uid": "k"}')]
        write_tar(home / "tars" / name, members)
    path = write_lines(home / "list.jsonl", [{"image_path": "1.png"}, {"image_path": "k"}])

    def joined(**more: str) -> list[Row]:
        media = {"uri": str(home / "tars"), **more}
        return read(ingest.open_source(IngestConfig(out="o", images=str(path), media=media)))

    assert "several images of" in joined()[0]["detail"]
    assert joined(key="uid")[1]["image"] == source(1)
