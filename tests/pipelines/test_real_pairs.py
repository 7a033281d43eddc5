"""Real photographs and their published blueprints, from raw pairs to the public form and back."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest

from dim.blueprint import Blueprint
from pipelines import edit, ingest
from pipelines.edit import EditConfig
from pipelines.ingest import IngestConfig
from pipelines.outputs import export
from pipelines.outputs.export import ExportConfig

PUBLIC = "tos_dataset_edit.jsonl"
VERSIONS = ("target", "target_b", "target_c")


def expanded(folder: Path, out: Path) -> Path:
    """All edited versions of every instruction as one JSONL file, images by absolute path."""
    lines = []
    for text in (folder / "instructions.jsonl").read_text().splitlines():
        line = json.loads(text)
        for version in VERSIONS:
            target = line["image_path_target"].replace("target", version)
            paths = {"image_path": line["image_path"], "image_path_target": target}
            lines.append(
                {
                    "id": f"{line['id']}-{version}",
                    "prompt": line["prompt"],
                    **{key: str(folder / path) for key, path in paths.items()},
                }
            )
    path = out / "all.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.usefixtures("ray_cluster")
def test_every_version_of_every_pair_is_kept(shared_real: Path, tmp_path: Path) -> None:
    pairs = expanded(shared_real / "edit_pairs", tmp_path)
    photos = (str(shared_real / "edit_pairs"),)
    raw = IngestConfig(pairs=str(pairs), out=str(tmp_path / "raw"), source="real", read_from=photos)
    assert ingest.run(raw).counts.kept == 27
    config = EditConfig(
        raw=raw.out,
        out=str(tmp_path / "edit"),
        designer=f"replay:{shared_real / 'edit_pairs' / PUBLIC}",
    )
    manifest = edit.run(config)
    assert (manifest.counts.kept, manifest.counts.rejected, manifest.counts.failed) == (27, 0, 0)
    loaded = datasets.load_dataset(
        "parquet",
        data_files=f"{config.out}/data/*.parquet",
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.num_rows == 27
    for row in loaded:
        assert (row["width"], row["height"], row["source"]) == (768, 768, "real")
        assert Blueprint.parse(row["blueprint"]).render() == row["blueprint"]
        assert Blueprint.parse(row["answer"]).render() == row["blueprint"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_export_equals_the_published_form(shared_real: Path, tmp_path: Path) -> None:
    published = shared_real / "edit_pairs"
    raw = IngestConfig(pairs=str(published / "instructions.jsonl"), out=str(tmp_path / "raw"))
    ingest.run(raw)
    designer = f"replay:{published / PUBLIC}"
    made = EditConfig(raw=raw.out, out=str(tmp_path / "edit"), designer=designer)
    edit.run(made)
    target = tmp_path / "public"
    manifest = export.run(ExportConfig(data=made.out, out=str(target)))
    assert manifest.counts.kept == 9

    def lines(folder: Path) -> list[dict[str, str]]:
        return [json.loads(line) for line in (folder / PUBLIC).read_text().splitlines()]

    assert lines(target) == lines(published)
    for line in lines(published):
        for key in ("image_path", "image_path_target"):
            assert (target / line[key]).read_bytes() == (published / line[key]).read_bytes()
    assert export.run(ExportConfig(data=made.out, out=str(target))) == manifest
