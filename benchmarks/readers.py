"""Feature shards on an S3 server, beside LitData and WebDataset reading the same tensors.

    pip install --no-deps litdata lightning-utilities obstore tifffile webdataset braceexpand
    python -m benchmarks.readers                           # three minutes on two cores
    python -m benchmarks.readers --samples 64 --rounds 1   # to see that it runs

Writes random features of edits once in each form into a bucket of rclone's S3 server, and takes
them all, in random order and in batches as a step gets them, in a process of its own for each
round: ours through ``training.data.Feed`` as the features job leaves them (a sample a row group),
once mixed over all and once within ``--window``; the others' as their manuals say, with a loader of
one worker. Rounds alternate and each way's best one counts. Leaves with status 1 when one of the
others is faster than our faster one, or when a package is missing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dim import records
from dim.features.encoder import Features, ShardFeatures
from dim.features.format import Preparation, pack_bf16, unpack_bf16
from dim.learning.batch import SampleOrder, WorkerOrder
from infra import storage
from infra.samples import open_features
from tests.rclone_server import ACCESS_KEY, SECRET_KEY, environment, running
from training.data import hold_groups, make_feed
from training.stage import StageConfig

TEXT = "blueprint"
BUCKET = "features"
PER_FILE = 64  # samples of a shard, of either form
SLACK = 1.0  # others may be as fast as ours


class Shape(NamedTuple):
    """Of a sample: condition tokens, features of each, and the latents' (C, h, w)."""

    tokens: int
    hidden: int
    latent: tuple[int, int, int]


class Sample(NamedTuple):
    """The bytes of a sample: bfloat16 hidden states and latents."""

    states: bytes
    latent: bytes
    source_latent: bytes


SHAPE = Shape(160, 2048, (32, 32, 32))


def main() -> int:
    """Write, read by turns, compare; returns the exit status."""
    options = _options()
    if options.read:
        print(json.dumps(read(options)))
        return 0
    missing = [name for name in ("litdata", "webdataset") if find_spec(name) is None]
    if missing:
        print(f"FAILED: {', '.join(missing)} cannot be imported; see --help for what to install")
        return 1
    with tempfile.TemporaryDirectory() as folder:
        buckets = Path(folder, "buckets")
        buckets.mkdir()
        for name, write in WRITERS.items():
            write(buckets / BUCKET / name, options.samples)
        with running(buckets) as url:
            rounds = [
                {name: _in_process(name, url, options) for name in READERS}
                for _ in range(options.rounds)
            ]
    return report({name: max(each[name] for each in rounds) for name in READERS})


def report(best: dict[str, float]) -> int:
    """Print samples a second; 1 if one of the others is faster than ours."""
    ours = max(rate for name, rate in best.items() if name.startswith("ours"))
    others = max(rate for name, rate in best.items() if not name.startswith("ours"))
    for name, rate in best.items():
        print(f"{name:20} {rate:7.1f} samples/s")
    print(f"{ours / others:.2f} times the faster of the others (bar {SLACK:.2f})")
    if ours < SLACK * others:
        print("FAILED: others read the same tensors faster")
        return 1
    return 0


def read(options: argparse.Namespace) -> float:
    """Samples a second of one reader over all samples, from opening to the last batch."""
    begun, count = time.perf_counter(), 0
    for batch in READERS[options.read](options):
        rows = len(batch.mask)
        assert batch.hidden_states.shape == (rows, SHAPE.tokens, SHAPE.hidden)
        assert batch.source_latent is not None and batch.latent.shape[1:] == SHAPE.latent
        count += rows
    assert count == options.samples, f"{count} of {options.samples} samples were read"
    return count / (time.perf_counter() - begun)


def samples(count: int) -> Iterator[Sample]:
    """Random features, the same ones for every form."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        states = torch.randn(SHAPE.tokens, SHAPE.hidden, generator=generator)
        latents = torch.randn(2, *SHAPE.latent, generator=generator)
        yield Sample(pack_bf16(states), pack_bf16(latents[0]), pack_bf16(latents[1]))


def write_shards(folder: Path, count: int) -> None:
    """As ``dim data features`` leaves them."""
    (folder / "data").mkdir(parents=True)
    nothing = Preparation(
        understanding="", autoencoder="", tokenizer="", image_processor=None, image_size=None,
        max_condition_tokens=SHAPE.tokens, resolution=1024,
    )  # fmt: skip
    schema = records.features_schema(
        "edit", [TEXT], encoding="bf16", preparation=nothing.model_dump_json()
    )
    files = []
    for number, some in enumerate(_in_files(samples(count))):
        rows = [
            {
                "id": f"{number}-{place}",
                "index": number * PER_FILE + place,
                "source": "random",
                f"{TEXT}_tokens": SHAPE.tokens,
                f"{TEXT}_states": sample.states,
                "hidden_size": SHAPE.hidden,
                "latent": sample.latent,
                "source_latent": sample.source_latent,
                "latent_shape": list(SHAPE.latent),
            }
            for place, sample in enumerate(some)
        ]
        path = folder / "data" / f"part-{number:05d}.parquet"
        table = pa.Table.from_pylist(rows, schema)
        pq.write_table(table, path, row_group_size=1, compression="NONE", use_dictionary=False)
        entry = {"path": f"data/{path.name}", "rows": len(rows), "bytes": path.stat().st_size}
        files.append(entry | {"sha256": ""})
    (folder / "manifest.json").write_text(json.dumps({"files": files}))


def write_litdata(folder: Path, count: int) -> None:
    """As LitData's ``BinaryWriter``, the heart of its ``optimize``, leaves them."""
    from litdata.streaming.writer import BinaryWriter

    folder.mkdir(parents=True)
    writer = BinaryWriter(str(folder), chunk_bytes="64MB")
    for number, sample in enumerate(samples(count)):
        writer.add_item(number, sample._asdict())
    writer.done()
    writer.merge()


def write_webdataset(folder: Path, count: int) -> None:
    """Tars of three files a sample."""
    folder.mkdir(parents=True)
    for number, some in enumerate(_in_files(samples(count))):
        with tarfile.open(folder / f"part-{number:05d}.tar", "w") as tar:
            for place, sample in enumerate(some):
                for name, data in sample._asdict().items():
                    entry = tarfile.TarInfo(f"{number:05d}{place:03d}.{name}")
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def read_ours(options: argparse.Namespace, window: int | None = None) -> Iterator[Features]:
    """Through the feed of a worker, with its draws."""
    address = f"s3://{BUCKET}/shards"
    config = StageConfig(
        stage="edit2",
        init="none",
        data=[address],
        out="none",
        epochs=1,
        batch_size=options.batch,
        learning_rate=1,
        cache_features=False,
        shuffle_window=window,
    )
    shards = open_features([address], [TEXT], edits=True)
    every = SampleOrder(shards.rows, options.batch, 0, window=window)
    order = WorkerOrder(every, 0, 1)
    hold_groups(config, order, shards.groups)
    feed = make_feed(config, order, ShardFeatures(shards, order.rows, [TEXT], in_memory=False))
    for step in range(every.steps_per_epoch):
        yield feed.get(step)[1]


def read_ours_in_window(options: argparse.Namespace) -> Iterator[Features]:
    """The same, mixed within a window."""
    return read_ours(options, options.window)


def read_litdata(options: argparse.Namespace) -> Iterator[Features]:
    """A shuffled ``StreamingDataset`` with an empty cache."""
    from litdata import StreamingDataLoader, StreamingDataset
    from litdata.streaming import downloader

    # There is no public way to a server without TLS.
    downloader._OBSTORE_CLIENT_OPTIONS["allow_http"] = True
    with tempfile.TemporaryDirectory() as cache:
        dataset = StreamingDataset(
            input_dir=f"s3://{BUCKET}/litdata", cache_dir=cache, shuffle=True, seed=0,
            storage_options={
                "endpoint_url": os.environ["AWS_ENDPOINT_URL"],
                "aws_access_key_id": ACCESS_KEY,
                "aws_secret_access_key": SECRET_KEY,
                "region_name": "us-east-1",
            },
        )  # fmt: skip
        yield from StreamingDataLoader(
            dataset, batch_size=options.batch, num_workers=1, collate_fn=_collate
        )


def read_webdataset(options: argparse.Namespace) -> Iterator[Features]:
    """Shards in random order, and a buffer in which samples are mixed."""
    import webdataset

    keys = storage.open_store(f"s3://{BUCKET}/webdataset").list()
    webdataset.gopen_schemes["s3"] = _open_object
    urls = [f"s3://{BUCKET}/webdataset/{name}" for name, _ in keys]
    dataset = (
        webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0)
        .shuffle(options.window)
        .batched(options.batch, collation_fn=_collate, partial=True)
    )
    yield from webdataset.WebLoader(dataset, batch_size=None, num_workers=1)


WRITERS: dict[str, Callable[[Path, int], None]] = {
    "shards": write_shards,
    "litdata": write_litdata,
    "webdataset": write_webdataset,
}
READERS: dict[str, Callable[[argparse.Namespace], Iterator[Features]]] = {
    "ours": read_ours,
    "ours, in a window": read_ours_in_window,
    "LitData": read_litdata,
    "WebDataset": read_webdataset,
}


def _in_process(name: str, url: str, options: argparse.Namespace) -> float:
    """One round of one reader, without what another has imported, opened or kept."""
    variables = {**os.environ, **environment(url), "OMP_NUM_THREADS": "1"}
    told = [f"--{key}={getattr(options, key)}" for key in ("samples", "batch", "window")]
    command = [sys.executable, "-m", "benchmarks.readers", f"--read={name}", *told]
    done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, check=True, text=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def _in_files(every: Iterable[Sample]) -> Iterator[list[Sample]]:
    some: list[Sample] = []
    for sample in every:
        some.append(sample)
        if len(some) == PER_FILE:
            yield some
            some = []
    if some:
        yield some


def _open_object(url: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
    bucket, key = url.removeprefix("s3://").split("/", 1)
    return boto3.client("s3").get_object(Bucket=bucket, Key=key)["Body"]


def _collate(some: list[dict[str, bytes]]) -> Features:
    """The batch that ``ShardFeatures`` makes."""
    shapes = {"states": (SHAPE.tokens, SHAPE.hidden)}
    states, latent, source = (
        torch.stack(
            [unpack_bf16(one[name], shapes.get(name, SHAPE.latent)).float() for one in some]
        )
        for name in Sample._fields
    )
    return Features(states, torch.ones(states.shape[:2], dtype=torch.bool), latent, source)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="\n".join((__doc__ or "").splitlines()[:5]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--samples", type=int, default=384, help="0.8 MB each")
    parser.add_argument("--batch", type=int, default=8, help="samples of a step")
    parser.add_argument("--window", type=int, default=64, help="samples among which is mixed")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--read", choices=READERS, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
