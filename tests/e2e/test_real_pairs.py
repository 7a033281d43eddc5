"""Real photographs through the whole data path and into training, with the tiny configuration."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest

from dim import model
from dim.config import load_config
from dim.images import decode_image
from pipelines import edit, ingest
from pipelines.outputs import export
from pipelines.outputs.manifest import Manifest
from training import train
from training.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
VERSIONS = ("", "_b", "_c")


@pytest.fixture(scope="module")
def pairs(shared_real: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """JSONL of the nine photos with each of their three edited versions."""
    folder = shared_real / "edit_pairs"
    lines = []
    for line in (folder / "instructions.jsonl").read_text().splitlines():
        record = json.loads(line)
        for version in VERSIONS:
            target = Path(record["image_path_target"])
            name = target.with_name(f"{target.stem}{version}{target.suffix}")
            lines.append(
                {
                    "id": f"{record['id']}{version}",
                    "image_path": str(folder / record["image_path"]),
                    "image_path_target": str(folder / name),
                    "prompt": record["prompt"],
                }
            )
    path = tmp_path_factory.mktemp("real") / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def shards(pairs: Path, shared_real: Path, ray_cluster: None) -> tuple[Path, Manifest]:
    """DIM-Edit shards of the real pairs, by the replay designer."""
    raw, out = pairs.parent / "raw", pairs.parent / "edit"
    photos = (str(shared_real / "edit_pairs"),)
    ingest.run(ingest.IngestConfig(pairs=str(pairs), out=str(raw), read_from=photos))
    recorded = shared_real / "edit_pairs" / "tos_dataset_edit.jsonl"
    manifest = edit.run(edit.EditConfig(raw=str(raw), designer=f"replay:{recorded}", out=str(out)))
    return out, manifest


def test_every_pair_is_accounted_for(shards: tuple[Path, Manifest]) -> None:
    counts = shards[1].counts
    assert counts.input == 27
    assert counts.failed == 0
    assert counts.kept + counts.rejected == 27
    assert counts.kept >= 24


def test_the_shards_are_read_by_others(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    files = sorted(str(file) for file in (shards[0] / "data").glob("*.parquet"))
    loaded = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path)
    )
    assert loaded.num_rows == shards[1].counts.kept
    first = loaded[0]
    assert decode_image(first["image"]).size == (first["width"], first["height"])
    assert first["blueprint"].startswith("1. Edit Instruction:")


def test_the_export_is_the_public_layout(
    shards: tuple[Path, Manifest], shared_real: Path, tmp_path: Path
) -> None:
    export.run(export.ExportConfig(data=str(shards[0]), out=str(tmp_path / "public")))
    lines = (tmp_path / "public" / "tos_dataset_edit.jsonl").read_text().splitlines()
    exported = {record["id"]: record for record in map(json.loads, lines)}
    folder = shared_real / "edit_pairs"
    compared = 0
    for line in (folder / "tos_dataset_edit.jsonl").read_text().splitlines():
        public = json.loads(line)
        if public["id"] not in exported:
            continue
        ours = exported[public["id"]]
        assert list(ours) == list(public)
        assert ours["prompt"] == public["prompt"]
        for field in ("image_path", "image_path_target"):
            written = (tmp_path / "public" / ours[field]).read_bytes()
            assert written == (folder / public[field]).read_bytes()
        compared += 1
    assert compared >= 8


def test_twenty_steps_of_training(shards: tuple[Path, Manifest], tmp_path: Path) -> None:
    config = load_config(
        StageConfig,
        ROOT / "configs" / "tiny-edit2.yaml",
        [
            f"init={ROOT / 'configs' / 'tiny.yaml'}",
            f"data=[{shards[0]}]",
            f"out={tmp_path / 'stage'}",
            "steps=20",
            "batch_size=6",
            "workers=1",
            "log_every=1",
            "checkpoint_every=10",
            "warmup_steps=2",
            "validation=null",
        ],
    )
    result = train.run(config)
    assert result.metrics["loss"] > 0
    trained = model.load(result.model_dir)
    row = pq.read_table(shards[0] / "data").slice(0, 1).to_pylist()[0]
    source = decode_image(row["image"])
    painted = trained.edit([source], [row["instruction"]], blueprints=[row["blueprint"]], steps=2)
    assert painted[0].image.size == source.size
