"""Records that end the process that works on them: each really does, in a worker of a real Ray."""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
import ray.data

from dim import designers
from dim.designers import CallOptions
from dim.errors import DimError, InputError
from dim.records import RAW_IMAGE
from infra.storage import open_store
from pipelines import attempts, ingest
from pipelines.attempts import MOST_ATTEMPTS, Attempts, TimeLimits, attempt
from pipelines.calls.worker import AskingWorker, AskInTurn, CalledModel
from pipelines.filter import FilterImagesConfig
from pipelines.filter import run as run_filter
from pipelines.filters import FilterImages, ImageRules
from pipelines.ingest import IngestConfig
from pipelines.outcome import fail, kept, to_rows, to_table, work_on
from pipelines.outputs.shards import Shards
from pipelines.outputs.verify import verify
from pipelines.ranges import scan
from pipelines.readers.fetch import FetchConfig
from pipelines.readers.sources import Source
from tests.image_server import ok, serving
from tests.pipelines.containers import write_lines
from tests.pipelines.samples import encoded, photo

pytestmark = pytest.mark.usefixtures("ray_cluster")

COUNT = 12
ORACLE = CalledModel("oracle", designers.create, CallOptions(), open_store("nowhere"))
ENOUGH = TimeLimits(60, 30)


def segfault() -> None:
    """A fault in C code."""
    faulthandler._sigsegv()


def leave() -> None:
    """A library that ends the program."""
    os._exit(3)


def hang() -> None:
    """A loop without end. The first attempt is ended here and not by the limit of its range."""
    if is_first_attempt():
        leave()
    time.sleep(1000)


def swell() -> None:
    """First what the system does to whom takes all of its memory, then the taking."""
    if is_first_attempt():
        os.kill(os.getpid(), signal.SIGKILL)
    np.ones(10**13)


def is_first_attempt() -> bool:
    """In a worker of Ray, and not in a process of its own."""
    return ray.is_initialized() and attempt() == 0


DEADLY: dict[Callable[[], None], str] = {
    segfault: "its process was ended by SIGSEGV",
    leave: "its process ended by itself with status 3",
    hang: "it was not done in 5 s",
    swell: "Unable to allocate",
}


@dataclass(frozen=True)
class Deadly:
    """A reader of which some records end the process."""

    reader: Any
    end: Callable[[], None]
    places: tuple[int, ...]

    def count(self, each: dict[str, Any]) -> int:
        return self.reader.count(each)

    def parts(self, each: dict[str, Any]) -> Iterator[Any]:
        return self.reader.parts(each)

    def table(self, part: Any) -> pa.Table:
        rows = self.reader.table(part).to_pylist()
        work_on(rows, "ingest", lambda row: self.end() if row["index"] in self.places else None)
        return to_table(rows, RAW_IMAGE)

    def lost(self, each: dict[str, Any], number: int, why: str) -> pa.Table:
        return self.reader.lost(each, number, why)


def take_in(
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    end: Callable[[], None],
    *places: int,
    **given: Any,
) -> list[dict[str, Any]]:
    """The failed records of a job that reads deadly ones."""
    given = given or {"tabletop_images": COUNT, "size": 32}
    config = IngestConfig(**given, rows_per_file=4, out=str(out), range_timeout_s=40)
    source = ingest.open_source(config)
    deadly = dataclasses.replace(source, reader=Deadly(source.reader, end, places))
    monkeypatch.setattr(ingest, "open_source", lambda config: deadly)
    made = ingest.run(config)
    assert made.counts.input == COUNT and made.counts.kept == COUNT - len(places)
    assert not verify(str(out)).problems
    return failures(out)


def failures(out: Path) -> list[dict[str, Any]]:
    table = pa.parquet.read_table(sorted((out / "failed").glob("*.parquet")))
    return table.to_pylist()


def test_a_record_that_ends_a_worker_which_fetches_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several ranges are in the worker at once, and all of them go on."""
    with serving() as server:
        server.answers = {f"/{n}": ok(encoded(photo(n))) for n in range(COUNT)}
        lines = [{"image_path": f"{server.url}/{n}"} for n in range(COUNT)]
        images = str(write_lines(tmp_path / "urls.jsonl", lines))
        fetch = FetchConfig(allow_private=True, workers=1, per_host_per_second=1000)
        (lost,) = take_in(tmp_path / "out", monkeypatch, leave, 5, images=images, fetch=fetch)
        monkeypatch.undo()
        assert lost["index"] == 5 and "ended by itself with status 3" in lost["error"]
        given: dict[str, Any] = {"images": images, "rows_per_file": 4}
        made = ingest.run(IngestConfig(**given, out=str(tmp_path / "good"), fetch=fetch))
    assert (made.counts.kept, made.counts.failed) == (COUNT, 0)
    rows = pa.parquet.read_table(tmp_path / "good" / "data", columns=["index", "image"])
    images_in = {row["index"]: row["image"] for row in rows.to_pylist()}
    assert images_in == {n: encoded(photo(n)) for n in range(COUNT)}


@pytest.mark.parametrize("end", DEADLY, ids=lambda end: end.__name__)
def test_a_record_that_ends_its_process_fails_and_the_others_do_not(
    end: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lost,) = take_in(tmp_path / "out", monkeypatch, end, 5)
    assert lost["index"] == 5 and lost["id"] == "tabletop-0-000005"
    assert lost["stage"] == "ingest" and DEADLY[end] in lost["error"]
    monkeypatch.undo()
    ingest.run(
        IngestConfig(
            tabletop_images=COUNT, size=32, rows_per_file=4, out=str(tmp_path / "undisturbed")
        )
    )
    kept_ones, all_of_them = (
        pa.parquet.read_table(sorted((tmp_path / name / "data").glob("*.parquet"))).to_pylist()
        for name in ("out", "undisturbed")
    )
    assert kept_ones == [row for row in all_of_them if row["index"] != 5]


def test_a_range_of_such_records_fails_before_each_has_ended_a_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "_MOST_DEATHS", 2)
    source = one_range()
    lost = later(Deadly(source.reader, leave, tuple(range(6))), source).to_pylist()
    assert [row["index"] for row in lost] == list(range(6))
    said = [row["error"] for row in lost]
    assert said[:2] == ["its process ended by itself with status 3"] * 2
    why = "not tried: others of its range ended their process or took all of the time"
    assert said[2:] == [why] * 4


def test_an_error_of_the_work_ends_the_job_also_in_a_later_attempt() -> None:
    source = one_range()
    with pytest.raises(InputError, match="changed while it was read"):
        later(Changed(source.reader, leave, ()), source)


def test_a_later_attempt_gives_the_same_parts_as_the_first() -> None:
    """Ray goes on with the block after the last one that came out of the first attempt."""
    source = one_range()
    work = Attempts(OfFour(source.reader, leave, ()), ENOUGH)
    first, second = list(work.tables(source.ranges[0])), list(work._one_by_one(source.ranges[0]))
    assert [table.num_rows for table in first] == [4, 2] and first == second


def one_range() -> Source:
    return ingest.open_source(IngestConfig(tabletop_images=6, size=32, out="nowhere"))


def later(reader: Deadly, source: Source) -> pa.Table:
    """What a later attempt makes of it, in this process."""
    return pa.concat_tables(Attempts(reader, ENOUGH)._one_by_one(source.ranges[0]))


@dataclass(frozen=True)
class Changed(Deadly):
    """A reader of a file that is not the one that it was."""

    def table(self, part: Any) -> pa.Table:
        raise InputError("a.parquet changed while it was read")


LIMITED = """
import time, sys
from pipelines.attempts import limited
def work():
    for seconds in (0, 0, 100):
        time.sleep(seconds)
        yield seconds
for number, table in enumerate(limited(work(), 2.0)):
    time.sleep(1.5)  # what is done with a table does not count
    print(number, flush=True)
"""


def test_a_range_that_takes_too_long_ends_its_process() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", LIMITED], capture_output=True, text=True)
    assert done.returncode != 0 and done.stdout.split() == ["0", "1"]
    assert "Timeout" in done.stderr and time.monotonic() - began < 60


@dataclass(frozen=True)
class OfFour(Deadly):
    """A reader with small parts."""

    def parts(self, each: dict[str, Any]) -> Iterator[Any]:
        for part in self.reader.parts(each):
            yield from (part[first : first + 4] for first in range(0, len(part), 4))


@dataclass(frozen=True)
class DeadlyFilter(FilterImages):
    """A filter that does not survive one picture."""

    def verdicts(self, batch: pa.Table) -> list[dict[str, Any]]:
        if any(row["index"] == 7 for row in kept(to_rows(batch))):
            segfault()
        return super().verdicts(batch)


class DeadlyConfig(FilterImagesConfig):
    """Its job."""

    def stage(self) -> FilterImages:
        return DeadlyFilter(self.filters)


def test_a_picture_that_the_filters_do_not_survive_is_a_failed_record(tmp_path: Path) -> None:
    raw, out = str(tmp_path / "raw"), tmp_path / "out"
    ingest.run(IngestConfig(tabletop_images=COUNT, size=32, rows_per_file=4, out=raw))
    rules = ImageRules(min_side=32)
    made = run_filter(DeadlyConfig(raw=raw, out=str(out), filters=rules))
    assert made.counts.failed == 1 and made.counts.add_up()
    (lost,) = failures(out)
    assert lost["index"] == 7 and lost["stage"] == "filter"
    assert lost["error"] == "its process was ended by SIGSEGV"
    scanned = scan(Shards.open(raw, RAW_IMAGE), DeadlyFilter(rules), 4).to_arrow_refs()
    rows = pa.concat_tables(ray.get(scanned)).sort_by("index").to_pylist()
    assert [row["index"] for row in rows] == list(range(COUNT))
    assert [row["outcome"] for row in rows].count("failed") == 1 and rows[7]["outcome"] == "failed"


class DeadlyStep:
    """A stage that does not survive the batch with one record."""

    def __init__(self, model: object, answers: object) -> None:
        del model, answers

    def __call__(self, batch: pa.Table) -> pa.Table:
        if any(row["index"] == 7 for row in kept(to_rows(batch))):
            leave()
        return batch


def test_a_batch_that_no_worker_survives_is_failed_records(tmp_path: Path) -> None:
    raw = str(tmp_path / "raw")
    ingest.run(IngestConfig(tabletop_images=COUNT, size=32, rows_per_file=4, out=raw))
    records = scan(Shards.open(raw, RAW_IMAGE), FilterImages(ImageRules(min_side=32)), 4)
    asked = records.map_batches(
        AskInTurn,
        fn_constructor_args=((DeadlyStep,), None, None),
        batch_format="pyarrow",
        batch_size=4,
        num_cpus=0.5,
        compute=ray.data.ActorPoolStrategy(size=1, enable_true_multi_threading=True),
    )
    rows = pa.concat_tables(ray.get(asked.to_arrow_refs())).sort_by("index").to_pylist()
    assert [row["index"] for row in rows] == list(range(COUNT))
    lost = [row for row in rows if row["outcome"] == "failed"]
    assert [row["index"] for row in lost] == [4, 5, 6, 7]
    assert f"ended {MOST_ATTEMPTS} times" in lost[0]["error"] and lost[0]["image"] is None


def test_what_cannot_fail_by_record_ends_the_job(tmp_path: Path) -> None:
    raw = str(tmp_path / "raw")
    ingest.run(IngestConfig(tabletop_images=COUNT, size=32, rows_per_file=4, out=raw))
    with pytest.raises(Exception, match=f"ended {MOST_ATTEMPTS} times"):
        scan(Shards.open(raw, RAW_IMAGE), partial(DeadlyStep(None, None)), 4).materialize()


def test_a_worker_that_dies_as_soon_as_it_is_started_ends_the_job(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attempts, "_restarts", lambda: 49)
    AskingWorker((), ORACLE)
    monkeypatch.setattr(attempts, "_restarts", lambda: 50)
    with pytest.raises(DimError, match="ended 50 times, the last time while it was started"):
        AskingWorker((), ORACLE)


def test_a_process_ends_at_the_first_of_the_deadlines_of_its_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    set_to: list[float | None] = []
    later, cancel = "dump_traceback_later", "cancel_dump_traceback_later"
    monkeypatch.setattr(faulthandler, later, lambda left, exit: set_to.append(left))
    monkeypatch.setattr(faulthandler, cancel, lambda: set_to.append(None))
    slow = attempts.limited(iter([1, 2]), 1000)  # type: ignore[list-item]

    def beside() -> Iterator[Any]:
        yield from attempts.limited(iter([3]), 10)  # type: ignore[list-item]
        yield set_to[-1]

    quick = attempts.limited(beside(), 500)
    assert [next(slow), next(quick)] == [1, 3]
    assert set_to[-1] is None
    left = next(quick)  # while the outer one is still being made, the inner one has come to its end
    assert isinstance(left, float) and 490 < left <= 500
    assert min(seconds for seconds in set_to if seconds is not None) <= 10


def test_attempts_that_reached_no_worker_do_not_count() -> None:
    task = os.urandom(8).hex()
    assert attempts._begun(task, 7) == 1  # the first that runs after the one whose machine went
    assert attempts._begun(task, 7) == 1  # asked again
    assert attempts._begun(task, 9) == 2
    assert attempts._begun(os.urandom(8).hex(), 9) == 1


@ray.remote(max_restarts=-1, num_cpus=0.1)
class Restarted:
    """An actor that says how often it was started."""

    def restarts(self) -> int:
        return attempts._restarts()

    def leave(self) -> None:
        os._exit(1)


def test_restarts_are_counted() -> None:
    assert attempts._restarts() == 0
    actor: Any = Restarted.remote()
    for count in range(3):
        assert patiently(actor) == count
        with pytest.raises(ray.exceptions.RayActorError):
            ray.get(actor.leave.remote())
    ray.kill(actor)


def patiently(actor: Any) -> int:
    for _ in range(100):
        try:
            return ray.get(actor.restarts.remote())
        except ray.exceptions.ActorUnavailableError:
            time.sleep(0.1)
    raise TimeoutError


def test_records_that_failed_before_are_not_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"id": "a", "index": 0, "image": b"x"}, {"id": "b", "index": 1}]
    fail(rows[1], "filter", "broken")
    monkeypatch.setattr(attempts, "attempt", lambda: MOST_ATTEMPTS)
    made = AskInTurn((DeadlyStep,), None, None)(to_table(rows, RAW_IMAGE)).to_pylist()
    assert [row["stage"] for row in made] == ["ask", "filter"]
