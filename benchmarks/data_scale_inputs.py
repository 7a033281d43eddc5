"""What is found out about an input before the first record is read: time, and memory of the driver.

The input are tars of JPEG-like members on the disk, and a table of records that name them.
"""

from __future__ import annotations

import gc
import io
import os
import tarfile
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import ray

from benchmarks.row import Row
from pipelines.readers import containers
from pipelines.readers.join import MediaConfig, MediaIndex
from pipelines.readers.layout import load_layout

TARS = 64
MEMBERS = 2000
BYTES = 1000  # of a member; only its header is read
KEYS = 20_000  # of the media of a join
RANGE = 512


@contextmanager
def tars(count: int, members: int) -> Iterator[str]:
    """A folder of tars with a sample of one image each."""
    with tempfile.TemporaryDirectory() as folder:
        for number in range(count):
            with tarfile.open(Path(folder, f"{number:05d}.tar"), "w") as tar:
                for member in range(members):
                    info = tarfile.TarInfo(f"{number:05d}-{member:07d}.jpg")
                    info.size = BYTES
                    tar.addfile(info, io.BytesIO(bytes(BYTES)))
        yield folder


@contextmanager
def cluster(cores: int) -> Iterator[None]:
    """A Ray of so many cores, whose workers have started and imported what they need."""
    ray.init(num_cpus=cores, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        warm = ray.remote(ready)
        ray.get([warm.remote() for _ in range(cores)])
        yield
    finally:
        ray.shutdown()


def ready() -> str:
    """Work of a moment that needs this module, so long that each worker gets some."""
    time.sleep(2)
    return containers.__name__


def cut(folder: str) -> containers.Cutter:
    """Scan a folder of tars."""
    found, layout = containers.find_files(folder), load_layout("images", pairs=False)
    cutter, _ = containers.cut(found, layout, RANGE, "tars")
    if cutter.rows != TARS * MEMBERS:
        raise RuntimeError(f"{cutter.rows} records were found")
    return cutter


def seconds(folder: str) -> float:
    """How long that takes."""
    began = time.monotonic()
    cut(folder)
    return time.monotonic() - began


@cache
def scans() -> tuple[float, float, float]:
    """Seconds with one core, and with all; and bytes that the driver keeps of a record."""
    with tars(TARS, MEMBERS) as folder:
        with cluster(1):
            one = seconds(folder)
        with cluster(os.cpu_count() or 1):
            every = seconds(folder)
            tracemalloc.start()
            cutter = cut(folder)
            cutter.ranges.clear()  # some hundred bytes for every 512 records
            gc.collect()
            kept, _ = tracemalloc.get_traced_memory()
            tracemalloc.stop()
    return one, every, kept / cutter.rows


def join() -> float:
    """Bytes that the driver keeps for each name of an image, or each image, of the media."""
    with tars(8, KEYS // 8) as folder, cluster(os.cpu_count() or 1):
        MediaIndex(MediaConfig(uri=folder))  # with whatever is imported on the way
        tracemalloc.start()
        index = MediaIndex(MediaConfig(uri=folder))
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        entries = 4 * index.images  # its path, its sample's name, both in plain letters; its place
    return kept / entries


ROWS = (
    Row(
        "scan-cores",
        f"times sooner that all cores scan {TARS} tars of {MEMBERS:,} members than one, a core",
        None,
        0.75,
        "more",
        lambda: scans()[0] / scans()[1] / (os.cpu_count() or 1),
    ),
    Row("scan-index", "bytes in the driver for a record", 105, 24, "less", lambda: scans()[2]),
    Row("join-index", "bytes in the driver for a name or image of the media", 77, 24, "less", join),
)
