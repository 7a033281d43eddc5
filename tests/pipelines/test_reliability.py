"""What a job survives: killed workers, a killed driver, a store that is busy, a disk that is full.

Each fault really happens, and each test ends the same way: the output is the one of a job that
nothing happened to, and every record of the input is in it once.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray.data

from dim import records
from dim.errors import StorageError
from infra import storage
from infra.storage import Store
from pipelines import edit, ingest
from pipelines.edit import EditConfig
from pipelines.filter import FilterPairsConfig
from pipelines.filter import run as run_filter
from pipelines.filters import PairRules
from pipelines.ingest import IngestConfig
from pipelines.job import Job, JobConfig, Remaining
from pipelines.outcome import Rejection, fail, reject, to_table
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.receipts import RangeOutput, WriteRanges
from pipelines.outputs.verify import verify
from tests.fault_proxy import FaultProxy, running

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).resolve().parents[2]
ROWS, RANGE = 60, 10
TABLE = PairRules(min_side=32, min_changed=0.0005, min_ssim=-1)


class Make:
    """Records from numbers; every fifth rejected, every seventh failed. Waits to be killed.

    Whoever reaches record 30 writes its process id to the first of ``victims`` that is not there
    and hangs; whoever finds all of them goes on.
    """

    def __init__(self, victims: Sequence[Path]) -> None:
        self._victims = victims

    def __call__(self, each: dict[str, Any]) -> Iterator[pa.Table]:
        first = RANGE * each["number"]
        for numbers in (range(first, first + 4), range(first + 4, first + RANGE)):
            awaited = (victim for victim in self._victims if not victim.exists())
            if 30 in numbers and (victim := next(awaited, None)):
                partial = victim.with_suffix(".new")
                partial.write_text(str(os.getpid()))
                partial.replace(victim)
                time.sleep(300)
            yield to_table(map(self._make, numbers), records.RAW_IMAGE)

    def _make(self, number: int) -> dict[str, Any]:
        image = bytes([number]) * 2000
        row = {"id": f"r{number}", "index": number, "source": "t", "image": image}
        if number % 5 == 4:
            reject(row, Rejection("image.blank", "nothing on it", 0, 1))
        elif number % 7 == 6:
            fail(row, "make", "broken")
        return row


class MakeRanges(WriteRanges):
    """The same for an actor."""

    def __init__(self, victims: Sequence[Path], output: RangeOutput) -> None:
        super().__init__(Make(victims), output)


@dataclass(frozen=True)
class Filling(Store):
    """A store whose disk is full when the receipt of the fourth range is to be written."""

    def write(self, name: str, data: bytes | pa.Buffer) -> None:
        filler = Path(self.path("filler"))
        if name.endswith("00003.json"):
            with suppress(OSError), filler.open("wb", buffering=0) as file:
                while file.write(bytes(1024)):
                    pass
        try:
            super().write(name, data)
        finally:
            filler.unlink(missing_ok=True)


def make(
    out: Path | str,
    victims: Sequence[Path] = (),
    *,
    actors: int = 0,
    store: type[Store] = Store,
) -> Manifest:
    config = JobConfig(out=str(out), rows_per_file=16, target_file_mb=0.02)
    job = Job("made", config, records.RAW_IMAGE, identity={}, rows=ROWS, ranges=ROWS // RANGE)
    how = {"batch_format": "pyarrow", "batch_size": 1}

    def build(work: Remaining) -> ray.data.Dataset:
        there = work.output.store
        output = replace(work.output, store=store(there.uri, there.root, there.connection))
        rows = [{"number": number, "rows": RANGE} for number in work.todo]
        ranges = ray.data.from_items(rows, override_num_blocks=len(rows))
        if not actors:
            return ranges.map_batches(WriteRanges(Make(victims), output), **how)
        pool = ray.data.ActorPoolStrategy(size=actors)
        given = (victims, output)
        return ranges.map_batches(MakeRanges, fn_constructor_args=given, compute=pool, **how)

    return job.run(build)


def check(uri: Path | str, manifest: Manifest, wanted: Manifest | None = None) -> None:
    """The output is whole, nothing is left over, and it is the one that was wanted."""
    counts = manifest.counts
    assert counts.input == counts.kept + counts.rejected + counts.failed
    assert verify(str(uri)).problems == []
    store = storage.open_store(str(uri))
    assert not store.exists("ranges") and not store.exists("unfinished.json")
    if wanted is not None:
        assert (manifest.files, manifest.counts) == (wanted.files, wanted.counts)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    manifest = make(out)
    check(out, manifest)
    assert (manifest.counts.kept, manifest.counts.rejected, manifest.counts.failed) == (41, 12, 7)
    assert manifest.rows_in("data") == 41 and len(manifest.files) > 6
    return manifest


@pytest.mark.parametrize("deaths", [1, 2], ids=["once", "twice"])
@pytest.mark.parametrize("actors", [0, 2], ids=["task", "actor"])
def test_a_worker_that_is_killed_loses_nothing(
    tmp_path: Path, undisturbed: Manifest, actors: int, deaths: int
) -> None:
    victims = [tmp_path / f"victim-{number}" for number in range(deaths)]
    killed: list[int] = []

    def kill() -> None:
        for victim in victims:
            while not victim.exists():
                time.sleep(0.05)
            killed.append(int(victim.read_text()))
            os.kill(killed[-1], signal.SIGKILL)

    threading.Thread(target=kill, daemon=True).start()
    manifest = make(tmp_path / "out", victims, actors=actors)
    assert len(set(killed) - {os.getpid()}) == deaths
    for process in killed:
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)
    check(tmp_path / "out", manifest, undisturbed)


# A driver that kills itself where the test says: before the file NAME is written, or after.
DRIVER = """
import os, signal, sys
from infra.storage import Store
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.outputs import receipts

out, name, moment = sys.argv[1:]
write, receipts_in = Store.write, receipts.receipts_in

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def watched_write(self, path, data):
    if path == name and moment == "before":
        die()
    write(self, path, data)
    if path == name and moment == "after":
        die()

def watched_receipts(tables):
    for receipt in receipts_in(tables):
        yield receipt
        if name == "ranges":
            die()

Store.write, receipts.receipts_in = watched_write, watched_receipts
ingest.run(IngestConfig(tabletop=40, out=out, rows_per_file=16, seed=3))
"""


def tabletop(out: Path | str) -> IngestConfig:
    return IngestConfig(tabletop=40, out=str(out), rows_per_file=16, seed=3)


@pytest.fixture(scope="module")
def drawn(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    out = tmp_path_factory.mktemp("drawn") / "out"
    manifest = ingest.run(tabletop(out))
    check(out, manifest)
    return manifest


@pytest.mark.parametrize(
    ("name", "moment"),
    [
        ("ranges", "halfway"),
        ("manifest.json", "before"),
        ("manifest.json", "after"),
    ],
)
def test_a_driver_that_is_killed_and_run_again(
    tmp_path: Path, drawn: Manifest, name: str, moment: str
) -> None:
    out = tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    process = subprocess.run(
        [sys.executable, "-c", DRIVER, str(out), name, moment],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": address},
        capture_output=True,
        timeout=300,
    )
    assert process.returncode == -signal.SIGKILL, process.stderr.decode()
    assert (out / "unfinished.json").exists()
    assert (out / "manifest.json").exists() == (moment == "after")
    done = {path: path.stat().st_mtime_ns for path in files_with_receipts(out)}
    assert len(done) == 3 if moment != "halfway" else done
    again = ingest.run(tabletop(out))
    assert {path: path.stat().st_mtime_ns for path in done} == done  # none was made again
    check(out, again, drawn)
    assert again.model_dump(exclude={"config"}) == drawn.model_dump(exclude={"config"})
    left = [path.name for path in out.rglob("*") if path.is_file() and path.suffix != ".parquet"]
    assert left == ["manifest.json"]


def files_with_receipts(out: Path) -> list[Path]:
    return [
        out / file["path"]
        for receipt in out.glob("ranges/*/*.json")
        for file in json.loads(receipt.read_text())["files"]
    ]


@pytest.fixture
def busy_store(s3: str, s3_endpoint: str) -> Iterator[tuple[str, FaultProxy]]:
    """The URI of a bucket behind a proxy, and the proxy."""
    with running(s3_endpoint) as proxy:
        yield f"{s3}/{{}}?endpoint_override={proxy.url}", proxy


@pytest.mark.slow
def test_a_store_that_is_busy_and_slow_for_a_while(
    tmp_path: Path, drawn: Manifest, busy_store: tuple[str, FaultProxy]
) -> None:
    bucket, proxy = busy_store

    def disturb() -> None:
        proxy.requests = 0
        proxy.busy = lambda number: number < 60 and number % 3 == 0
        proxy.delay = lambda number: 0.2 if number % 4 == 0 else 0.0

    disturb()
    manifest = ingest.run(tabletop(bucket.format("raw")))
    disturb()
    config = EditConfig(
        raw=bucket.format("raw"),
        out=bucket.format("edit"),
        designer="oracle",
        filters=TABLE,
        batch_size=8,
        rows_per_file=16,
    )
    edited = edit.run(config)
    disturb()
    chosen = {"filters": TABLE, "batch_size": 8, "rows_per_file": 16}
    pairs = FilterPairsConfig(raw=bucket.format("raw"), out=bucket.format("good"), **chosen)
    good = run_filter(pairs)
    assert proxy.statuses[503] >= 20
    proxy.busy = lambda number: False
    check(bucket.format("raw"), manifest, drawn)
    check(bucket.format("edit"), edited)
    check(bucket.format("good"), good)
    ingest.run(tabletop(tmp_path / "raw"))
    here = {"raw": str(tmp_path / "raw"), "out": str(tmp_path / "edit")}
    local = edit.run(config.model_copy(update=here))
    assert (edited.counts, edited.files) == (local.counts, local.files)
    here = {"raw": str(tmp_path / "raw"), "out": str(tmp_path / "good")}
    local = run_filter(pairs.model_copy(update=here))
    assert (good.counts, good.files) == (local.counts, local.files)


def test_a_store_that_is_gone_is_one_sentence_and_the_job_can_be_run_again(
    drawn: Manifest, busy_store: tuple[str, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = busy_store
    monkeypatch.setattr("infra.s3.ATTEMPTS", 2)
    proxy.busy = lambda number: number > 4
    with pytest.raises(
        StorageError, match=r"s3://.*: the store is (too busy|unavailable)"
    ) as error:
        ingest.run(tabletop(bucket.format("raw")))
    assert "\n" not in str(error.value)
    proxy.busy = lambda number: False
    check(bucket.format("raw"), ingest.run(tabletop(bucket.format("raw"))), drawn)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with 64 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if sys.platform != "linux" or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk_is_one_sentence_and_the_job_can_be_run_again(
    small_disk: Path, undisturbed: Manifest
) -> None:
    out = small_disk / "out"
    with pytest.raises(StorageError, match="cannot write .*: no space left on the disk") as error:
        make(out)
    assert "\n" not in str(error.value)
    assert not (out / "manifest.json").exists()
    assert not list(out.rglob("*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    check(out, make(out), undisturbed)


def test_a_disk_that_is_full_when_a_receipt_is_written(
    small_disk: Path, undisturbed: Manifest
) -> None:
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    out = small_disk / "out"
    with pytest.raises(StorageError, match="cannot write .*00003.json: no space left on the disk"):
        make(out, store=Filling, actors=1)  # so that no other range meets the full disk
    assert not list(out.rglob("*.tmp")) and not list(out.rglob("00003.json"))
    assert list(out.glob("data/part-00003-*"))  # its files were whole
    done = {path: path.stat().st_mtime_ns for path in files_with_receipts(out)}
    check(out, make(out), undisturbed)
    assert {path: path.stat().st_mtime_ns for path in done} == done


def test_a_store_that_is_gone_when_the_manifest_is_written(
    drawn: Manifest, busy_store: tuple[str, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, proxy = busy_store
    monkeypatch.setattr("infra.s3.ATTEMPTS", 2)
    write = manifests.write

    def go(store: Store, manifest: Manifest) -> None:
        proxy.busy = lambda number: True
        write(store, manifest)

    with monkeypatch.context() as patch:
        patch.setattr(manifests, "write", go)
        with pytest.raises(StorageError, match=r"cannot write s3://.*/manifest.json.*: the store"):
            ingest.run(tabletop(bucket.format("raw")))
    proxy.busy = lambda number: False
    store = storage.open_store(bucket.format("raw"))
    assert not store.exists("manifest.json") and store.exists("unfinished.json")
    done: list[int] = []
    again = ingest.run(
        tabletop(bucket.format("raw")), on_progress=lambda now, of, usd: done.append(now)
    )
    assert done == []  # every range had its receipt
    check(bucket.format("raw"), again, drawn)
