"""The named layouts, each on a small copy of how the data set is published; and the join by key."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dim.config import load_config
from dim.errors import ConfigError, InputError
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import layout
from tests.pipelines.containers import (
    source,
    struct,
    target,
    write_lines,
    write_parquet,
    write_tar,
)
from tests.pipelines.readers.test_containers import read

Made = tuple[Path, dict[str, Any]]


def ultraedit(folder: Path) -> Made:
    row = {
        "source_image": struct(source(0)),
        "edited_image": struct(target(0)),
        "edit_prompt": "Add box 0.",
        "source_caption": "a field",
        "clip_sim_dir": 0.2,
        "ssim": 0.8,
    }
    write_parquet(folder / "data" / "FreeForm_0-00000-of-00001.parquet", [row])
    return folder, {}


def magicbrush(folder: Path) -> Made:
    row = {
        "img_id": "242679",
        "turn_index": 1,
        "source_img": struct(source(0)),
        "mask_img": struct(source(9)),
        "instruction": "Add box 0.",
        "target_img": struct(target(0)),
    }
    write_parquet(folder / "data" / "train-00000-of-00051.parquet", [row])
    return folder, {}


def seed_data_edit(folder: Path) -> Made:
    (folder / "images").mkdir(parents=True)
    (folder / "images" / "s.png").write_bytes(source(0))
    (folder / "images" / "t.png").write_bytes(target(0))
    line = {
        "source_image": "images/s.png",
        "target_image": "images/t.png",
        "instruction": "Add box 0.",
        "source_image_caption": "a field",
    }
    return write_lines(folder / "annotations.jsonl", [line]), {}


def sharegpt(folder: Path) -> Made:
    items = [
        {
            "input_prompt": "Add box 0.",
            "input_image": ["text_and_image_to_image/0_in.png"],
            "output_image": "text_and_image_to_image/0.png",
        }
    ]
    members = [
        ("text_and_image_to_image/0_in.png", source(0)),
        ("text_and_image_to_image/0.png", target(0)),
    ]
    write_tar(folder / "tars" / "text_and_image_to_image_part_0.tar", members)
    (folder / "text_and_image_to_image.json").write_text(json.dumps(items))
    return folder / "text_and_image_to_image.json", {"media": {"uri": str(folder / "tars")}}


def pico_banana(folder: Path) -> Made:
    (folder / "openimage_source_images").mkdir(parents=True)
    (folder / "images" / "positive-edit").mkdir(parents=True)
    (folder / "openimage_source_images" / "a.png").write_bytes(source(0))
    (folder / "images" / "positive-edit" / "1.png").write_bytes(target(0))
    line = {
        "open_image_input_url": "https://example.org/a.png",
        "text": "Add box 0.",
        "output_image": "images/positive-edit/1.png",
        "edit_type": "Add a new object to the scene",
        "summarized_text": "box",
        "local_input_image": "openimage_source_images/a.png",
    }
    return write_lines(folder / "sft_with_local_source_image_path.jsonl", [line]), {}


def imgedit(folder: Path) -> Made:
    stem = "results_remove_laion_part5/00094_00030_000304748"
    row = {
        "input_images": [f"{stem}/original.png"],
        "output_images": [f"{stem}/result.png"],
        "prompt": "Add box 0.",
    }
    write_parquet(folder / "Parquet" / "remove_part5.parquet", [row])
    members = [(f"{stem}/original.png", source(0)), (f"{stem}/result.png", target(0))]
    write_tar(folder / "Singleturn" / "remove_part5.tar", members)
    return folder / "Parquet", {"media": {"uri": str(folder / "Singleturn")}}


@pytest.mark.parametrize(
    ("name", "write", "id"),
    [
        ("ultraedit", ultraedit, "ultraedit-00000000"),
        ("magicbrush", magicbrush, "242679-1"),
        ("seed-data-edit", seed_data_edit, "annotations-00000000"),
        ("sharegpt-4o-image", sharegpt, "text_and_image_to_image-00000000"),
        ("pico-banana", pico_banana, "sft_with_local_source_image_path-00000000"),
        ("imgedit", imgedit, "Parquet-00000000"),
    ],
)
def test_a_published_pair_comes_in(
    name: str, write: Callable[[Path], Made], id: str, tmp_path: Path
) -> None:
    where, more = write(tmp_path / name)
    config = IngestConfig(out="o", pairs=str(where), layout=name, **more)
    (row,) = read(ingest.open_source(config))
    assert (row["outcome"], row["error"], row["id"]) == ("kept", None, id)
    assert row["instruction"] == "Add box 0."
    assert (row["image"], row["image_target"]) == (source(0), target(0))


def test_several_input_images_are_no_pair(tmp_path: Path) -> None:
    where, more = sharegpt(tmp_path)
    (item,) = json.loads(where.read_text())
    where.write_text(json.dumps([{**item, "input_image": item["input_image"] * 2}, 7]))
    config = IngestConfig(out="o", pairs=str(where), layout="sharegpt-4o-image", **more)
    two, seven = read(ingest.open_source(config))
    assert (two["reason"], two["value"]) == ("record.several_images", 2)
    assert "item 1: a JSON int where an object" in seven["error"]


def test_text_to_image_of_sharegpt(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(source(1))
    path = tmp_path / "text_to_image.json"
    path.write_text(json.dumps([{"input_prompt": "a field", "output_image": "1.png"}]))
    config = IngestConfig(out="o", images=str(path), layout="sharegpt-4o-image-t2i")
    (row,) = read(ingest.open_source(config))
    assert (row["image"], row["caption_hint"]) == (source(1), "a field")


def test_a_layout_of_ones_own_and_wrong_ones(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("image: [before]\ntarget: [after]\ninstruction: [ask]\nid: [key]\n")
    made = write_parquet(
        tmp_path / "a.parquet",
        [{"before": struct(source(0)), "after": struct(target(0)), "ask": "Add it.", "key": 5}],
    )
    (row,) = read(ingest.open_source(IngestConfig(out="o", pairs=str(made), layout=str(own))))
    assert (row["outcome"], row["id"], row["instruction"]) == ("kept", "5", "Add it.")
    with pytest.raises(ConfigError, match="no layout 'ultraedits'; there are images, imgedit"):
        layout.load_layout("ultraedits", pairs=True)
    with pytest.raises(ConfigError, match="not one of pairs"):
        layout.load_layout("images", pairs=True)
    with pytest.raises(ConfigError, match="give it with --pairs"):
        layout.load_layout("ultraedit", pairs=False)
    own.write_text("image: [before]\nimages: [x]\n")
    with pytest.raises(ConfigError, match=r"own.yaml: unknown key 'images'"):
        layout.load_layout(str(own), pairs=False)
    with pytest.raises(ConfigError, match="go with pairs or images"):
        load_config(IngestConfig, None, ["out=o", "tabletop=1", "layout=pairs"])


CAPTIONS = [
    {"image_path": f"k{n}", "prompt": f"A long caption of picture {n}."} for n in (3, 0, 7, 1)
]


def kale(folder: Path) -> dict[str, str]:
    """Parquet by ``uid``."""
    rows = [{"uid": f"k{n}", "jpg": struct(source(n)), "x": n} for n in range(5)]
    write_parquet(folder / "a.parquet", rows, row_group=2)
    return {"uri": str(folder), "key": "uid"}


def cc3m(folder: Path) -> dict[str, str]:
    """Tars whose JSON has the ``id``, in front of the image or behind it."""
    members = []
    for n in range(5):
        sample = [
            (f"{n}.json", json.dumps({"id": f"k{n}"}).encode()),
            (f"{n}.png", source(n)),
        ]
        members += sample if n % 2 else sample[::-1]
    write_tar(folder / "a.tar", members)
    return {"uri": str(folder), "key": "id"}


def allava(folder: Path) -> dict[str, str]:
    """A folder of images, by path."""
    folder.mkdir()
    for n in range(5):
        (folder / f"k{n}.png").write_bytes(source(n))
    return {"uri": str(folder)}


@pytest.mark.parametrize("write", [kale, cc3m, allava])
def test_the_public_form_joins_its_images_by_key(
    write: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    media = write(tmp_path / "media")
    path = write_lines(tmp_path / "public.jsonl", CAPTIONS)
    config = IngestConfig(out="o", images=str(path), media=media, rows_per_file=3)
    made = ingest.open_source(config)
    found = read(made)
    kept = [row for row in found if row["outcome"] == "kept"]
    assert [row["image"] for row in kept] == [source(3), source(0), source(1)]
    assert kept[0]["caption_hint"] == "A long caption of picture 3."
    assert json.loads(kept[0]["provenance"])["image_path"] == "k3"
    assert found[2]["reason"] == "record.unmatched_key" and "'k7'" in found[2]["detail"]
    assert made.identity["keys_unmatched"] == 1 and made.identity["images_unused"] == 2


def test_media_without_what_it_needs_say_so(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "public.jsonl", CAPTIONS)
    media = kale(tmp_path / "media")

    def opened(**changes: str | None) -> None:
        ingest.open_source(IngestConfig(out="o", images=str(path), media={**media, **changes}))

    with pytest.raises(InputError, match="say with media.key which column"):
        opened(key=None)
    with pytest.raises(InputError, match="no column 'image_id'; its columns are uid, x, jpg"):
        opened(key="image_id")
    with pytest.raises(InputError, match="no images, tables or tars in"):
        (tmp_path / "none").mkdir()
        opened(uri=str(tmp_path / "none"))


@pytest.mark.usefixtures("ray_cluster")
def test_a_whole_join_adds_up_and_reports_both_sides(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "public.jsonl", CAPTIONS)
    media = cc3m(tmp_path / "media")
    config = IngestConfig(out=str(tmp_path / "raw"), images=str(path), media=media, rows_per_file=3)
    manifest = ingest.run(config)
    assert (manifest.counts.input, manifest.counts.kept, manifest.counts.rejected) == (4, 3, 1)
    assert manifest.counts.by_reason == {"record.unmatched_key": 1}
    assert (manifest.input["keys_unmatched"], manifest.input["images_unused"]) == (1, 2)
    again = ingest.run(config.model_copy(update={"out": str(tmp_path / "again")}))
    assert [f.sha256 for f in again.files] == [f.sha256 for f in manifest.files]
