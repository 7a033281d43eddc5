"""The filter job against a bare process pool and against ``datasets.map``, and its memory.

    python -m benchmarks.data_filters                               # as reported
    python -m benchmarks.data_filters --pairs 200 --large 800       # a minute, to see that it runs
    python -m benchmarks.data_filters --plain --no-memory           # and Ray Data's own reader

All three read the same Parquet shards of edit pairs and do the same on the same number of
processes: decode both images, resize, perceptual hashes, structural similarity and the other
default rules of pairs. In a process of each, libraries compute in one thread, as Ray has it for a
task of one core: with one for every core, pool and map need twice the processor time. The pool
stops there. ``datasets.map`` and our job also find duplicates
across the whole data set and write the kept records as Parquet. The pool and Ray are started and
warm before the clock runs; runs alternate and the best of each counts. ``cpu_ms_per_pair`` is the
processor time of all processes, Ray's own among them, which a busy machine changes less. Memory is
what the job's driver and workers hold of their own (unique set size) at their peak, in a run of a
process of its own for each size; the shared object store, whose size is fixed, is not part of it.

Leaves with status 1 when the job is below ``--pool-target`` of the pool or ``--map-target`` of
``datasets.map``, when the outputs differ, or when memory at ``--large`` records is above
``--memory-target`` of that at ``--small``.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
from PIL import Image

from dim import records
from pipelines.cluster import connect
from pipelines.filter import FilterPairsConfig
from pipelines.filter import run as run_filter
from pipelines.filters import FilterPairs, PairRules
from pipelines.filters.duplicates import (
    SIGNATURE,
    DuplicateRules,
    explained,
    find_duplicates,
    known_of,
    reject_duplicates,
)
from pipelines.filters.verdicts import GiveVerdicts
from pipelines.outcome import travelling
from pipelines.outputs import manifest
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.readers.records import pair_columns

RULES = PairRules(min_side=None)
DUPLICATES = DuplicateRules()
ROWS_PER_FILE = 64
BATCH = 64
STORE = 300 << 20  # bytes of Ray's object store
MIB = 1 << 20
SAMPLE_S = 0.2
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")  # read when a library is loaded

GIVE_VERDICTS = GiveVerdicts.of(FilterPairs(RULES), DUPLICATES)
"""The functions that all three do: from encoded pairs to outcomes, measures and hashes."""
COLUMNS = travelling(SIGNATURE).names


def main() -> int:
    """Run the comparison, or one job in a child process; returns the exit status."""
    options = _options()
    if options.peak_of is not None:
        print(_peak(Path(options.peak_of), options.processes))
        return 0
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        sizes = {} if options.no_memory else {options.small: 0, options.large: 0}
        for records_count in sizes:
            raw = folder / f"raw-{records_count}"
            make_pairs(raw, records_count, options.memory_side)
            sizes[records_count] = _peak_of_child(raw, options)
            shutil.rmtree(raw)
        raw = folder / "raw"
        make_pairs(raw, options.pairs, options.side)
        rates, cpu, kept = compare(raw, folder, options)
    return _report(options, rates, cpu, kept, sizes)


def make_pairs(folder: Path, count: int, side: int) -> None:
    """Raw shards of ``count`` JPEG pairs, all different, as ``dim data ingest`` would make them."""
    files = []
    for first in range(0, count, ROWS_PER_FILE):
        rows = [_pair(n, side) for n in range(first, min(first + ROWS_PER_FILE, count))]
        table = pa.Table.from_pylist(rows, schema=records.RAW_PAIR)
        path = folder / f"data/part-{first // ROWS_PER_FILE:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path)
        digest = records.sha256_hex(path.read_bytes())
        name = str(path.relative_to(folder))
        files.append(FileEntry(path=name, rows=len(rows), bytes=path.stat().st_size, sha256=digest))
    counts = Counts(input=count, kept=count, rejected=0, failed=0, by_reason={})
    done = Manifest(job="ingest", config={}, input={}, counts=counts, files=tuple(files))
    (folder / manifest.NAME).write_text(done.model_dump_json())


def picture(number: int, side: int) -> Image.Image:
    """A picture with detail at every scale, another one for every number."""
    rng = np.random.default_rng(number)
    pixels = np.zeros((side, side, 3))
    for cells, weight in ((4, 0.5), (24, 0.25), (side // 2, 0.25)):
        coarse = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += weight * np.asarray(coarse.resize((side, side), Image.Resampling.BILINEAR))
    return Image.fromarray(pixels.astype(np.uint8))


def _pair(number: int, side: int) -> dict[str, Any]:
    """A picture, and the same with a box in it."""
    source = picture(number, side)
    target = source.copy()
    left, top = (int(n) for n in np.random.default_rng(number).integers(0, side * 2 // 3, 2))
    target.paste((255, 0, 0), (left, top, left + side // 4, top + side // 4))
    instruction = f"Add red box number {number}."
    images = []
    for image in (source, target):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    return {
        "id": f"pair-{number:06}",
        "index": number,
        "source": "bench",
        "instruction": instruction,
        **pair_columns(instruction, *images),
    }


def compare(
    raw: Path, folder: Path, options: argparse.Namespace
) -> tuple[dict[str, float], dict[str, float], dict[str, int]]:
    """Records per second of each way, its processor time, and how many records it kept."""
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    kept: dict[str, int] = {}
    with _cluster(options.processes), _pool(options.processes) as pool:
        ways: dict[str, Callable[[Path], int]] = {
            "job": lambda data: run_job(data, folder / "job").counts.kept,
            "map": lambda data: run_map(data, folder / "map", options.processes),
            "pool": lambda data: sum(pool.imap_unordered(_count_kept, _files(data))),
        }
        if options.plain:
            ways["plain"] = lambda data: run_plain(data, new_reader=True)
            ways["plain_fused"] = lambda data: run_plain(data, new_reader=False)
        warm = folder / "warm"
        make_pairs(warm, 2 * BATCH, 64)
        for run in ways.values():
            run(warm)
        for _ in range(options.repeats):
            for name, run in ways.items():
                os.sync()  # what one way left to be written must not slow the next one down
                start, before = time.perf_counter(), _cpu_seconds()
                kept[name] = run(raw)
                taken, used = time.perf_counter() - start, _cpu_seconds() - before
                seconds[name] = min(seconds.get(name, taken), taken)
                cpu[name] = min(cpu.get(name, used), used)
    return {name: options.pairs / taken for name, taken in seconds.items()}, cpu, kept


def _cpu_seconds() -> float:
    """Of this process and all that it has started, those that have ended too."""
    own = psutil.Process()
    total = 0.0
    for each in [own, *own.children(recursive=True)]:
        with suppress(psutil.Error):  # gone meanwhile: its parent has its time
            total += sum(each.cpu_times()[:4])
    return total


def run_job(raw: Path, out: Path) -> Manifest:
    """Our job, from shards to committed output."""
    config = FilterPairsConfig(
        raw=str(raw),
        out=str(out),
        rows_per_file=ROWS_PER_FILE,
        filters=RULES,
        duplicates=DUPLICATES,
        batch_size=BATCH,
    )
    return run_filter(config, overwrite=True)


def run_map(raw: Path, out: Path, processes: int) -> int:
    """The same by the datasets library: load, map, duplicates, and the kept records on disk."""
    import datasets

    datasets.disable_progress_bars()
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    data = datasets.load_dataset(
        "parquet", data_files=_files(raw), split="train", cache_dir=str(out / "cache")
    )
    # Arrow in and out is its fastest form: no picture becomes a Python object on the way.
    judged = data.with_format("arrow").map(
        _add_verdicts, batched=True, batch_size=BATCH, num_proc=processes
    )
    verdicts = judged.select_columns(COLUMNS).with_format("arrow")[:]
    ids = dict(
        zip(verdicts["index"].to_pylist(), map(repr, verdicts["id"].to_pylist()), strict=True)
    )
    losers = explained(find_duplicates(known_of(verdicts), DUPLICATES), ids)
    verdicts = reject_duplicates(verdicts, losers)
    kept = judged.select(pc.indices_nonzero(pc.equal(verdicts["outcome"], "kept")).to_pylist())
    with (out / "data.parquet").open("wb") as file:
        kept.select_columns(records.RAW_PAIR.names).to_parquet(file)
        os.fsync(file.fileno())  # our job's files are on the disk too when it says so
    return kept.num_rows


def run_plain(raw: Path, *, new_reader: bool) -> int:
    """Ray Data's own reader with the functions behind it, and nothing else, like the pool.

    Its newer reader, the default, is a step of its own; the older one is fused with what follows.
    """
    ray.data.DataContext.get_current().use_datasource_v2 = new_reader
    judged = ray.data.read_parquet(_files(raw)).map_batches(
        GIVE_VERDICTS, batch_format="pyarrow", batch_size=BATCH
    )
    kept = 0
    for table in judged.iter_batches(batch_format="pyarrow", batch_size=None):
        kept += pc.sum(pc.equal(table["outcome"], "kept")).as_py() or 0
    steps = [line for line in judged.stats().splitlines() if line.startswith("Operator")]
    print(f"plain: {'; '.join(steps)}", file=sys.stderr)
    return kept


def _add_verdicts(table: pa.Table) -> pa.Table:
    verdicts = GIVE_VERDICTS(table)
    for name in [name for name in COLUMNS if name not in table.schema.names]:
        table = table.append_column(verdicts.schema.field(name), verdicts[name])
    return table


def _count_kept(path: str) -> int:
    """How many records of a file the functions keep; runs in a process of the pool."""
    return sum(
        outcome == "kept" for outcome in GIVE_VERDICTS(pq.read_table(path))["outcome"].to_pylist()
    )


def _files(raw: Path) -> list[str]:
    return [str(path) for path in sorted((raw / "data").glob("*.parquet"))]


@contextmanager
def _pool(processes: int) -> Iterator[Any]:
    # Spawned: a fork of a process with Ray's threads can hang.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield pool


@contextmanager
def _cluster(processes: int) -> Iterator[None]:
    """A Ray of as many cores as the others have processes."""
    ray.init(
        address="local",
        num_cpus=processes,
        object_store_memory=STORE,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
        # Ray's workers give way to whatever else runs, unless told otherwise; the others' do not.
        _system_config={"worker_niceness": 0},
    )
    connect()
    yield
    ray.shutdown()


def _peak_of_child(raw: Path, options: argparse.Namespace) -> int:
    command = [
        *(sys.executable, __file__, "--peak-of", str(raw)),
        *("--processes", str(options.processes)),
    ]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return int(done.stdout.split()[-1])


def _peak(raw: Path, processes: int) -> int:
    """Bytes that the driver and the workers of one job hold of their own at once, at most."""
    with _cluster(processes), tempfile.TemporaryDirectory(dir=raw.parent) as out:
        peak, done = [0], threading.Event()
        watcher = threading.Thread(target=_watch, args=(peak, done))
        watcher.start()
        run_job(raw, Path(out) / "out")
        done.set()
        watcher.join()
    return peak[0]


def _watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(SAMPLE_S):
        own = psutil.Process()
        workers = [each for each in own.children(recursive=True) if _is_worker(each)]
        peak[0] = max(peak[0], sum(map(_unique, [own, *workers])))


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.name().startswith("ray::")
    except psutil.Error:  # gone meanwhile
        return False


def _unique(process: psutil.Process) -> int:
    try:
        return process.memory_full_info().uss
    except psutil.Error:
        return 0


def _report(
    options: argparse.Namespace,
    rates: dict[str, float],
    cpu: dict[str, float],
    kept: dict[str, int],
    peaks: dict[int, int],
) -> int:
    to_pool, to_map = rates["job"] / rates["pool"], rates["job"] / rates["map"]
    growth = peaks[options.large] / peaks[options.small] if peaks else None
    figures = {
        "pairs": options.pairs,
        "side": options.side,
        "processes": options.processes,
        "pairs_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        "cpu_ms_per_pair": {
            name: round(1000 * used / options.pairs, 1) for name, used in cpu.items()
        },
        "job_to_pool": round(to_pool, 3),
        "job_to_map": round(to_map, 3),
        **{
            f"{name}_to_pool": round(rates[name] / rates["pool"], 3)
            for name in rates
            if name.startswith("plain")
        },
        "kept": kept,
        "peak_mib": {str(count): round(peak / MIB) for count, peak in peaks.items()},
        "memory_growth": None if growth is None else round(growth, 3),
    }
    print(json.dumps(figures, indent=2))
    failures = [
        said
        for failed, said in (
            (to_pool < options.pool_target, "the job is too slow beside the pool"),
            (to_map < options.map_target, "the job is too slow beside datasets.map"),
            (len(set(kept.values())) != 1 or not kept["job"], "the kept records differ"),
            (
                growth is not None and growth > options.memory_target,
                "memory grows with the number of records",
            ),
        )
        if failed
    ]
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000, help="pairs of the comparison")
    parser.add_argument("--side", type=int, default=768, help="side of its images in pixels")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--repeats", type=int, default=3, help="timed runs; the best counts")
    parser.add_argument("--small", type=int, default=2000, help="records of the smaller job")
    parser.add_argument("--large", type=int, default=20_000, help="records of the larger job")
    parser.add_argument("--memory-side", type=int, default=256, help="of the images of these two")
    parser.add_argument("--plain", action="store_true", help="also Ray Data's own Parquet reader")
    parser.add_argument("--no-memory", action="store_true", help="only the comparison")
    parser.add_argument("--folder", help="where to put the data while it runs")
    parser.add_argument("--pool-target", type=float, default=0.85, help="share of the pool's rate")
    parser.add_argument("--map-target", type=float, default=1.1, help="ratio to datasets.map")
    parser.add_argument("--memory-target", type=float, default=1.15, help="growth of memory")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.small >= options.large:
        parser.error("--small must be below --large")
    return options


def in_one_thread() -> None:
    """Begin this program anew where libraries would compute in a thread for every core."""
    if any(os.environ.get(name) != "1" for name in _THREADS):
        again = [sys.executable, "-m", "benchmarks.data_filters", *sys.argv[1:]]
        os.execve(again[0], again, {**os.environ, **dict.fromkeys(_THREADS, "1")})  # noqa: S606


if __name__ == "__main__":
    in_one_thread()
    sys.exit(main())
