"""What the driver of a job holds of a record, with duplicates looked for, on synthetic records.

    python -m benchmarks.data_scale_driver                     # as reported, some minutes
    python -m benchmarks.data_scale_driver --few 2000 --many 20000   # to see that it runs

The filter job runs from raw shards to its manifest, once with few records and once with many, in a
process of its own each time. A record has a picture of eight bytes that nobody decodes: its hash
follows from its place, and one in ten is a duplicate. The most resident memory of the driver
counts, with what it maps of Ray's object store.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import typer

from benchmarks.row import Row as Figure
from dim import records
from pipelines.filter import FilterImagesConfig, run
from pipelines.filters import FilterImages, ImageRules
from pipelines.outcome import Row, to_rows
from pipelines.outputs import manifest
from pipelines.outputs.manifest import Counts, FileEntry, Manifest

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


def peak_of_driver(raw: Path, out: Path) -> int:
    """The most bytes of memory of this process while it drives the job."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=1 << 30)
    done = run(SyntheticConfig(raw=str(raw), out=str(out)))
    assert done.counts.rejected == done.counts.input // 10, done.counts
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak(count: int) -> int:
    """The same of a job with so many records, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "raw"
        make_images(raw, count)
        command = [sys.executable, "-m", "benchmarks.data_scale_driver", "--drive", str(raw)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        shutil.rmtree(raw)
    return int(done.stdout.split()[-1])


def bytes_a_record(few: int = FEW, many: int = MANY) -> float:
    """By how much the driver grows with each record."""
    return (peak(many) - peak(few)) / (many - few)


ROWS = (
    Figure(
        "driver",
        "bytes of the driver a record, from 100,000 to 1,000,000 records",
        613,  # from 20,000 to 100,000
        100,
        "less",
        bytes_a_record,
    ),
)


def main(
    few: Annotated[int, typer.Option(min=1)] = FEW,
    many: Annotated[int, typer.Option(min=2)] = MANY,
    drive: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print by how many bytes the driver grows with each record."""
    if drive is not None:
        print(peak_of_driver(drive, drive.parent / "out"))
    else:
        print(f"{bytes_a_record(few, many):.1f} bytes of the driver a record")


if __name__ == "__main__":
    typer.run(main)
