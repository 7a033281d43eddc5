"""What a worker reads, holds and waits for when it trains on images live.

    python benchmarks/feed.py                              # two minutes
    python benchmarks/feed.py --samples 200 --steps 20     # to see that it runs

Writes JPEGs and captions, once some and once ten times as many, and takes the samples of the same
number of steps through ``training.data.Feed``, mixed over all data and within a window. In place of
frozen parts and painter stands a pause of ``--step-ms``. Leaves with status 1 when memory grows by
half with ten times the data, when the steps wait for data more than 5 % of the time, or when a row
group is read twice as often within a window as it would be at best.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from PIL import Image

from dim.errors import SampleError
from dim.features.encoder import Features
from dim.features.row_groups import whole
from dim.features.shards import Share
from dim.images import decode_image
from dim.learning.batch import SampleOrder, WorkerOrder
from dim.model.framing import centre_crop
from dim.model.pixels import to_bytes
from infra.samples import open_images
from training.data import Feed, hold_groups
from training.stage import StageConfig

GROUP = 64  # records of a row group
GROWN = 1.5
WAITED = 0.05
READ = 2.0


@dataclass(frozen=True)
class Result:
    """Of one pass: ``order`` and ``samples`` say which.

    ``read`` row groups read a sample, ``held`` bytes at most, ``wait`` the share of the time.
    """

    order: str
    samples: int
    read: float
    held: int
    wait: float


class Pixels:
    """Live features as far as the CPU makes them: decoded and cut."""

    def __init__(self, share: Share, side: int) -> None:
        self._share = share
        self._shape = (side, side)

    def fetch(
        self, positions: NDArray[np.int64], texts: NDArray[np.int64]
    ) -> list[torch.Tensor | SampleError]:
        """See ``dim.features.encoder.FeatureSource``."""
        rows = whole(self._share.fetch(positions))
        return [to_bytes(centre_crop(decode_image(row["image"]), self._shape)) for row in rows]

    def collate(self, fetched: Sequence[torch.Tensor]) -> Features:
        """See there."""
        pixels = torch.stack(list(fetched))
        return Features(pixels, pixels, pixels, None)

    def batch(self, positions: NDArray[np.int64], texts: NDArray[np.int64]) -> Features:
        """See there."""
        return self.collate(whole(self.fetch(positions, texts)))


def main() -> int:
    """Write, take the steps, compare; returns the exit status."""
    options = _options()
    torch.set_num_threads(1)
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for samples in (options.samples, 10 * options.samples):
            uri = write_images(Path(folder, str(samples)), samples, options.side)
            results += [_take(options, uri, samples, window) for window in (None, options.window)]
    return report(results, options)


def report(results: Sequence[Result], options: argparse.Namespace) -> int:
    """Print the table; 1 where a bar is missed."""
    failures = []
    for one in results:
        print(
            f"{one.samples:7,} samples, mixed {one.order:13} {one.read:6.3f} row groups read and "
            f"{one.wait:5.1%} waited a step, {one.held / 1e6:7.1f} MB held at most"
        )
        if one.wait > WAITED:
            failures.append(f"steps wait for data {one.wait:.1%} of the time")
        if one.order != "over all" and one.read > READ * _best(options):
            failures.append(f"{one.read:.3f} row groups are read a sample within a window")
    for small, large in zip(results[:2], results[2:], strict=True):
        if large.held > GROWN * small.held:
            failures.append(f"memory grows {large.held / small.held:.1f} times with the data")
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def _best(options: argparse.Namespace) -> float:
    """Row groups a sample where each is read once and the walk has begun everywhere."""
    taken = options.steps / (options.steps + options.window)
    return 1 / GROUP / taken


def _take(options: argparse.Namespace, uri: str, samples: int, window: int | None) -> Result:
    """Two passes: where every allocation is noted, what a step takes itself takes twice as long."""
    wait, _ = _walk(options, uri, samples, window)
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups

    def counted(self: Any, groups: list[int], **settings: Any) -> Any:
        read.extend(groups)
        return plain(self, groups, **settings)

    def begun() -> None:
        read.clear()
        tracemalloc.start()

    pq.ParquetFile.read_row_groups = counted
    try:
        _, arrow = _walk(options, uri, samples, window, begun)
        held = tracemalloc.get_traced_memory()[1] + arrow
    finally:
        tracemalloc.stop()
        pq.ParquetFile.read_row_groups = plain
    name = "over all" if window is None else f"within {window}"
    return Result(name, samples, len(read) / (options.steps * options.batch), held, wait)


def _walk(
    options: argparse.Namespace,
    uri: str,
    samples: int,
    window: int | None,
    begun: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """A worker's steps; ``begun`` is called when the first one is there.

    Returns:
        The share of the time that was waited for samples, and the bytes that Arrow held at most.
    """
    config = StageConfig(
        stage="t2i",
        init="unused",
        data=[uri],
        out="unused",
        steps=options.steps,
        batch_size=options.batch,
        learning_rate=1e-4,
        cache_features=False,
        shuffle_window=window,
    )
    images = open_images([uri], config.columns, every_file=False)
    order = WorkerOrder(SampleOrder(samples, options.batch, 0, window=window), 0, 1)
    hold_groups(config, order, images.groups)
    source = Pixels(Share(images, order.rows), options.side)
    feed = Feed(config, order, source, [(1, 1, 1)], rows=samples, ahead=config.prefetch_steps)
    feed.get(0)
    begun()
    before = pa.total_allocated_bytes()
    began, waited, arrow = time.perf_counter(), 0.0, 0
    for step in range(1, options.steps + 1):
        asked = time.perf_counter()
        feed.get(step)
        waited += time.perf_counter() - asked
        arrow = max(arrow, pa.total_allocated_bytes() - before)
        time.sleep(options.step_ms / 1000)
    return waited / (time.perf_counter() - began), arrow


def write_images(folder: Path, samples: int, side: int) -> str:
    (folder / "data").mkdir(parents=True)
    schema = pa.schema(
        [("id", pa.string()), pa.field("image", pa.large_binary()), ("caption", pa.string())]
    )
    generator, files = np.random.default_rng(0), []
    image = _jpeg(generator, side)
    for first in range(0, samples, 4 * GROUP):
        path = folder / "data" / f"part-{first:07d}.parquet"
        numbers = range(first, min(samples, first + 4 * GROUP))
        rows = [{"id": str(number), "image": image, "caption": "some"} for number in numbers]
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, path, row_group_size=GROUP, use_dictionary=False)
        entry = {"path": f"data/{path.name}", "rows": len(rows), "bytes": path.stat().st_size}
        files.append(entry | {"sha256": ""})
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return str(folder)


def _jpeg(generator: np.random.Generator, side: int) -> bytes:
    """A picture with structure at every scale, of which a decoder has work."""
    coarse = Image.fromarray(generator.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
    file = io.BytesIO()
    coarse.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000, help="images; then ten times as many")
    parser.add_argument("--side", type=int, default=256, help="pixels of an image")
    parser.add_argument("--batch", type=int, default=4, help="samples of a step")
    parser.add_argument("--steps", type=int, default=200, help="of a pass")
    parser.add_argument("--window", type=int, default=64, help="shuffle_window")
    parser.add_argument("--step-ms", type=float, default=50.0, help="a step takes besides data")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
