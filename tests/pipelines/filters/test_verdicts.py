"""Filtering on a real local Ray: duplicates across batches, and the same result however cut."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import ray.data
from PIL import Image

from dim.errors import InputError
from dim.records import RAW_IMAGE
from pipelines import ingest
from pipelines.filters import FilterImages, ImageRules, cells
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import judge
from pipelines.ingest import IngestConfig
from pipelines.job import Job, JobConfig, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.receipts import WriteRanges
from pipelines.outputs.shards import Shards
from pipelines.ranges import ranges_of
from tests.pipelines.models import save_clip
from tests.pipelines.samples import encoded
from tests.pipelines.test_jobs import check_output, rows_in

pytestmark = pytest.mark.usefixtures("ray_cluster")

RULES = ImageRules(min_side=32, min_sharpness=None)
DUPLICATES = DuplicateRules()
PICTURES = 20


def picture(seed: int) -> Image.Image:
    """A picture with something in every frequency that the hash looks at."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8))
    return coarse.resize((96, 96), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def raw(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Shards:
    """Raw images far apart in the input: 20 pictures; 2 of them again as JPEG, 1 as it was."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(PICTURES):
        data = encoded(picture(number))
        (folder / f"a{number:02}.png").write_bytes(data)
    (folder / "a05.png").write_bytes(data[: len(data) // 2])
    for number in (3, 5):
        image = picture(number)
        (folder / f"b{number:02}.jpg").write_bytes(encoded(image, "JPEG", quality=85))
    (folder / "c04.png").write_bytes((folder / "a04.png").read_bytes())
    (folder / "d03.png").write_bytes(encoded(picture(3).resize((80, 80))))
    out = str(folder.parent / "raw")
    ingest.run(IngestConfig(images=str(folder), out=out, rows_per_file=5))
    return Shards.open(out, RAW_IMAGE)


def run(raw: Shards, out: Path, batch_size: int, duplicates: DuplicateRules) -> Manifest:
    config = JobConfig(out=str(out), rows_per_file=8)
    ranges = ranges_of(raw, 8)
    identity, rows = raw.identity, raw.rows
    job = Job("filter", config, RAW_IMAGE, identity=identity, rows=rows, ranges=len(ranges))

    def build(work: Remaining) -> ray.data.Dataset:
        found, judged = judge(
            raw,
            ranges,
            work.todo,
            FilterImages(RULES),
            duplicates,
            batch_size,
            store=work.output.store,
            key=work.key,
        )
        return ray.data.from_items(found).map_batches(
            WriteRanges(judged.records, work.output), batch_format="pyarrow", batch_size=1
        )

    return job.run(build, overwrite=True)


def test_duplicates_are_found_across_the_whole_data_set(raw: Shards, tmp_path: Path) -> None:
    manifest = run(raw, tmp_path / "out", 2, DUPLICATES)
    check_output(tmp_path / "out", manifest)
    assert manifest.counts.by_reason == {
        "duplicate.exact": 1,
        "duplicate.near": 2,
        "image.undecodable": 1,
    }
    rejected = {row["id"]: row for row in rows_in(tmp_path / "out", "rejected")}
    assert all("'a03'" in rejected[name]["detail"] for name in ("b03", "d03"))
    assert rejected["c04"]["detail"] == "the same as 'a04'"
    kept = rows_in(tmp_path / "out", "data")
    assert "b05" in {row["id"] for row in kept}  # its twin could not be read
    for row in kept:
        assert Image.open(io.BytesIO(row["image"])).size == (96, 96)


def test_how_the_input_is_cut_changes_nothing(raw: Shards, tmp_path: Path) -> None:
    outputs = [run(raw, tmp_path / str(size), size, DUPLICATES) for size in (1, 7, 100)]
    assert outputs[0].files == outputs[1].files == outputs[2].files


def test_without_rules_for_duplicates_they_stay(raw: Shards, tmp_path: Path) -> None:
    manifest = run(raw, tmp_path / "out", 4, DuplicateRules(exact=False, max_distance=None))
    assert manifest.counts.by_reason == {"image.undecodable": 1}


@pytest.mark.parametrize("per_cell", [8192, 8])
def test_embeddings_match_on_the_cluster(
    raw: Shards, tmp_path: Path, per_cell: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one cell, and in several."""
    monkeypatch.setattr(cells, "PER_CELL", per_cell)
    save_clip(tmp_path / "clip")
    rules = DuplicateRules(
        exact=False, max_distance=None, embedding_model=str(tmp_path / "clip"), max_cosine=0.999999
    )
    manifest = run(raw, tmp_path / "out", 6, rules)
    assert manifest.counts.by_reason["duplicate.embedding"] >= 1
    rejected = {row["id"] for row in rows_in(tmp_path / "out", "rejected")}
    assert "c04" in rejected and "a04" not in rejected


def test_a_model_that_is_not_there_stops_the_job_before_the_first_record(
    raw: Shards, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no folder of a transformers model"):
        run(raw, tmp_path / "out", 4, DuplicateRules(embedding_model=str(tmp_path / "none")))
