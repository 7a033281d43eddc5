"""What the driver of a job holds of a record, on synthetic records.

    python -m benchmarks.data_scale_driver                     # as reported, a quarter of an hour
    python -m benchmarks.data_scale_driver --job ingest --few 2000 --many 20000   # that it runs

A job runs to its manifest, once with few records and once with many, in a process of its own each
time; the most resident memory of the driver counts, with what it maps of Ray's object store.
``filter`` reads raw shards and looks for duplicates: a record has a picture of eight bytes that
nobody decodes, its hash follows from its place, and one in ten is a duplicate. ``ingest`` reads
Parquet files with a tiny picture and a caption in each row.
"""

from __future__ import annotations

import io
import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer
from PIL import Image

from benchmarks.row import Row as Figure
from dim import records
from pipelines.filter import FilterImagesConfig, run
from pipelines.filters import FilterImages, ImageRules
from pipelines.ingest import IngestConfig
from pipelines.ingest import run as ingest
from pipelines.outcome import Row, to_rows
from pipelines.outputs import manifest
from pipelines.outputs.manifest import Counts, FileEntry, Manifest

Job = Literal["filter", "ingest"]
JOBS: tuple[Job, ...] = ("filter", "ingest")
FEW, MANY = 100_000, 1_000_000
ROWS_PER_FILE, ROWS_PER_GROUP = 16_384, 256
_MIX = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class SyntheticFilter(FilterImages):
    """Keeps all, and gives each a hash that follows from its place."""

    def verdicts(self, batch: pa.Table) -> list[Row]:
        """As the filters of images give them."""
        rows = to_rows(batch)
        for row in rows:
            place = row["index"] - (row["index"] % 10 == 9)  # one in ten is the one before it
            row |= {"measures": [], "text_key": 0, "hashes": [place * _MIX % 2**64]}
        return rows


class SyntheticConfig(FilterImagesConfig):
    """The filter job with them."""

    def stage(self) -> SyntheticFilter:
        """Them."""
        return SyntheticFilter(ImageRules())


def make_images(folder: Path, count: int) -> None:
    """Raw shards of so many records, as ``dim data ingest`` would leave them."""
    (folder / "data").mkdir(parents=True)
    files = []
    for first in range(0, count, ROWS_PER_FILE):
        places = np.arange(first, min(first + ROWS_PER_FILE, count))
        texts = pa.array([f"{place:032x}" for place in places])
        given = {
            "id": texts,
            "index": pa.array(places),
            "source": pa.array(["synthetic"] * len(places)),
            "image": pa.array([b"\0" * 8] * len(places), pa.large_binary()),
            "content_hash": texts,
        }
        columns = [
            given[field.name].cast(field.type)
            if field.name in given
            else pa.nulls(len(places), field.type)
            for field in records.RAW_IMAGE
        ]
        name = f"data/part-{first // ROWS_PER_FILE:05d}.parquet"
        table = pa.table(columns, schema=records.RAW_IMAGE)
        pq.write_table(table, folder / name, row_group_size=ROWS_PER_GROUP)
        size = (folder / name).stat().st_size
        files.append(FileEntry(path=name, rows=len(places), bytes=size, sha256=f"{first:064x}"))
    counts = Counts(input=count, kept=count, rejected=0, failed=0, by_reason={})
    done = Manifest(job="ingest", config={}, input={}, counts=counts, files=tuple(files))
    (folder / manifest.NAME).write_text(done.model_dump_json())


def make_tables(folder: Path, count: int) -> None:
    """Parquet files of so many pictures, as somebody may bring them."""
    folder.mkdir(parents=True)
    file = io.BytesIO()
    Image.new("RGB", (4, 4), "teal").save(file, "PNG")
    for first in range(0, count, ROWS_PER_FILE):
        places = range(first, min(first + ROWS_PER_FILE, count))
        captions = [f"scene {place}" for place in places]
        table = pa.table({"image": [file.getvalue()] * len(places), "caption": captions})
        name = f"part-{first // ROWS_PER_FILE:05d}.parquet"
        pq.write_table(table, folder / name, row_group_size=ROWS_PER_GROUP)


def peak_of_driver(job: Job, raw: Path, out: Path) -> int:
    """The most bytes of memory of this process while it drives the job."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    if job == "filter":
        counts = run(SyntheticConfig(raw=str(raw), out=str(out))).counts
        assert counts.rejected == counts.input // 10, counts
    else:
        counts = ingest(IngestConfig(images=str(raw), out=str(out))).counts
        assert counts.kept == counts.input, counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(job: Job, count: int) -> int:
    """The same of a job with so many records, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        (make_images if job == "filter" else make_tables)(raw, count)
        command = ["benchmarks.data_scale_driver", "--job", job, "--drive", str(raw)]
        done = subprocess.run(
            [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, check=True
        )
        shutil.rmtree(raw)
    return int(done.stdout.split()[-1])


def bytes_a_record(job: Job, few: int = FEW, many: int = MANY) -> float:
    """By how much the driver grows with each record."""
    return (peak(job, many) - peak(job, few)) / (many - few)


ROWS = (
    Figure(
        "driver",
        "bytes of the driver a record, from 100,000 to 1,000,000 records",
        613,  # from 20,000 to 100,000
        100,
        "less",
        partial(bytes_a_record, "filter"),
    ),
    Figure(
        "ingest-driver",
        "the same of an ingest",
        None,
        100,
        "less",
        partial(bytes_a_record, "ingest"),
    ),
)


def main(
    few: Annotated[int, typer.Option(min=1)] = FEW,
    many: Annotated[int, typer.Option(min=2)] = MANY,
    job: Annotated[Job | None, typer.Option(help="Only this one.")] = None,
    drive: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print by how many bytes the driver grows with each record."""
    if drive is not None and job is not None:
        print(peak_of_driver(job, drive, drive.parent / "out"))
        return
    for each in JOBS if job is None else (job,):
        print(f"{each}: {bytes_a_record(each, few, many):.1f} bytes of the driver a record")


if __name__ == "__main__":
    typer.run(main)
