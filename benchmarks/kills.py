"""The kill matrix: every data job, killed at every moment, and run again.

    python -m benchmarks.kills [--jobs ingest edit] [--docs] [--folder DIR]

A driver, and separately a worker, is ended by SIGKILL when it reaches a moment of a range in the
middle of the input; then the same job is run again. Told for each: whether every file is the one of
a job that nothing happened to and no other is there, how many records are lost or there twice, how
many answers were paid for again that had been there for a second, how many calls were made again
that had not, and how many ranges were begun again. Fails where a file is another one, a record lost
or doubled, an answer paid twice, more calls made again than are under way at once (of an object
store that is only told), or more ranges begun again than are worked on at once.
Prints the table of ``docs/data/reliability.md``; ``--docs`` puts the rows of these jobs there.
Everything runs on one local cluster, in ranges of a few records; "edit on S3" and the like write
to rclone's S3 server.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import ray

from dim.blueprint import Blueprint
from dim.designers import CallOptions
from infra import storage
from infra.storage import Output, Store
from pipelines import edit, features, filter, ingest, t2i
from pipelines.calls.answers import read_entries
from pipelines.cluster import connect
from pipelines.filters import ImageRules, PairRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import KeptVerdicts
from pipelines.job import JobConfig
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.receipts import RangeOutput
from pipelines.stages.caption import CaptionRules
from tests import rclone_server

RECORDS, RANGE = 48, 6
STRUCK = 2
"""The range that a kill comes in."""

READING, STAGE, FILE, RECEIPT = "reading", "in a stage", "in a file", "before the receipt"
MANIFEST, FINISHED = "before the manifest", "after the manifest"
MOMENTS = (READING, STAGE, FILE, RECEIPT, MANIFEST, FINISHED)
OF_DRIVER = (MANIFEST, FINISHED)
"""Moments at which no worker does anything."""

DRIVER, WORKER = "driver", "worker"
ON_S3, BUCKET = " on S3", "kills"
PLAN = "DIM_KILLS_PLAN"
HEAD = """\
| job | killed | moment | same files | lost | doubled | paid again | calls cut off | begun again |
| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: |"""
ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs/data/reliability.md"
_PATIENCE_S = 180.0
_FRESH_S = 1.0  # an answer may wait so long for the object that takes it
_ANSWER_S = 0.02
_CALLS_AT_ONCE, _RANGES_AT_ONCE = 2, max(3, os.cpu_count() or 1)
_WAIT_S = 2.0  # until the cluster has ended the workers of a driver that is gone
_CAPTIONS = CaptionRules(min_words=5, min_dimensions=0, min_dimensions_in_prose=0)
_DRAWN: dict[str, Any] = dict.fromkeys(("min_entropy", "min_sharpness", "max_text_area"))
_PAIRS = PairRules(min_side=32, min_changed=None, min_ssim=None, max_shift=None, **_DRAWN)
_IMAGES = ImageRules(min_side=32, **_DRAWN)
_ALIKE = DuplicateRules(exact=True, max_distance=None)


@dataclass(frozen=True)
class Cell:
    """What came of one kill."""

    job: str
    moment: str
    victim: str
    same: bool
    lost: int
    doubled: int
    paid_again: int
    cut_off: int
    done_again: int

    @property
    def row(self) -> str:
        """Its line in the table."""
        same = "yes" if self.same else "NO"
        return (
            f"| {self.job} | {self.victim} | {self.moment} | {same} | {self.lost} | {self.doubled} "
            f"| {self.paid_again} | {self.cut_off} | {self.done_again} |"
        )

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost, doubled, paid twice or made otherwise, or too much again."""
        under_way = self.job.endswith(ON_S3) or self.cut_off <= _CALLS_AT_ONCE
        same = self.same and not (self.lost or self.doubled or self.paid_again)
        return same and under_way and self.done_again <= _RANGES_AT_ONCE


WATCHED: tuple[tuple[type, str], ...] = (
    (RangeOutput, "_write"),
    (Output, "write"),
    (Store, "write"),
    (KeptVerdicts, "_find"),
)
"""What the jobs pass at the moments."""


def main() -> int:
    """Run the matrix; returns the exit status."""
    options = _options()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=options.folder)))
        designer = stack.enter_context(_designer())
        os.environ[PLAN] = str(folder / "plan.json")
        if any(job.endswith(ON_S3) for job in options.jobs):
            (folder / "s3" / BUCKET).mkdir(parents=True)
            url = stack.enter_context(rclone_server.running(folder / "s3"))
            os.environ |= rclone_server.environment(url)
        _connect()
        settings = _inputs(folder, designer, options.jobs)
        print(HEAD, flush=True)
        cells = []
        for job in options.jobs:
            notes = folder / job
            notes.mkdir()
            outputs = f"s3://{BUCKET}/{job.split()[0]}" if job.endswith(ON_S3) else f"{notes}/out"
            config = partial(_settings_at, settings[job.removesuffix(ON_S3)], outputs)
            for cell in run_matrix(notes, job, config, designer, options.moments):
                cells.append(cell)
                print(cell.row, flush=True)
        ray.shutdown()
    if options.docs:
        DOCS.write_text(with_rows(DOCS.read_text(), cells))
    return 0 if all(cell.is_good for cell in cells) else 1


def with_rows(page: str, cells: Iterable[Cell]) -> str:
    """A page whose table has these rows in place of those of the same jobs, and says when."""
    rows = [cell.row for cell in cells]
    jobs = {row.split(" | ")[0] for row in rows}
    before, head, rest = page.partition(HEAD)
    if not head:
        raise ValueError("the page has no table of kills")
    old, blank, after = rest.partition("\n\n")
    there = [row for row in old.strip().splitlines() if row.split(" | ")[0] not in jobs]
    order = {f"| {job}": place for place, job in enumerate(_WHERE)}
    table = sorted([*there, *rows], key=lambda row: order[row.split(" | ")[0]])
    today = f"{datetime.date.today():%d %B %Y}".lstrip("0")
    after = re.sub(r"(?<=last printed )[^,;.]*(?=[,;.])", today, after, count=1)
    return "\n".join([before + head, *table]) + blank + after


def run_matrix(
    folder: Path,
    job: str,
    config: Callable[[str], JobConfig],
    designer: Designer,
    moments: Iterable[str] = MOMENTS,
    victims: Iterable[str] = (DRIVER, WORKER),
) -> Iterator[Cell]:
    """Kill one job at each moment.

    Args:
        folder: for notes.
        job: its name.
        config: its settings, for an output of a name.
        designer: the server that it asks, if it asks one.
        moments: at which it is killed.
        victims: who is.
    """
    wanted = config("undisturbed")
    whole = _run(job, wanted)
    for moment in moments:
        for victim in victims:
            if victim == WORKER and moment in OF_DRIVER:
                continue
            name = f"{moment} {victim}".replace(" ", "-")
            yield _kill(job, moment, victim, config(name), folder / name, (wanted, whole), designer)


def arm() -> None:
    """Have this process, a driver or a worker, reach the moments; the plan says what happens."""
    written, output, store, kept = RangeOutput._write, Output.write, Store.write, KeptVerdicts._find
    here = threading.local()

    def watched_range(
        self: RangeOutput, number: int, rows: int, tables: Iterable[pa.Table], *paid: Any
    ) -> Any:
        note(f"range {number}")
        here.number = number

        def made() -> Iterator[pa.Table]:
            if number == STRUCK:
                strike(READING)
            for table in tables:
                if number == STRUCK:
                    strike(STAGE)
                yield table

        try:
            return written(self, number, rows, made(), *paid)
        finally:
            here.number = None

    def watched_output(self: Output, data: Any) -> int:
        if getattr(here, "number", None) == STRUCK and len(data) > 1:
            output(self, bytes(data)[: len(data) // 2])
            strike(FILE)
            return output(self, bytes(data)[len(data) // 2 :]) + len(data) // 2
        return output(self, data)

    def watched_store(self: Store, name: str, data: Any) -> None:
        if name.startswith("ranges/") and name.endswith(f"{STRUCK:05d}.json"):
            strike(RECEIPT)
        if name == manifests.NAME:
            strike(MANIFEST)
        store(self, name, data)
        if name == manifests.NAME:
            strike(FINISHED)

    def watched_verdicts(self: KeptVerdicts, piece: Any) -> Any:
        if f"part-{STRUCK:05d}" in piece.file:
            strike(READING)
        return kept(self, piece)

    watched = (watched_range, watched_output, watched_store, watched_verdicts)
    for (owner, method), instead in zip(WATCHED, watched, strict=True):
        setattr(owner, method, instead)


def strike(moment: str) -> None:
    """Kill whom the plan says, the first time that its moment is reached by anybody."""
    plan = _plan()
    if plan.get("moment") != moment:
        return
    try:
        os.close(os.open(plan["token"], os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(plan["driver"] if plan["victim"] == DRIVER else os.getpid(), signal.SIGKILL)
    time.sleep(_PATIENCE_S)  # as somebody who is about to be ended by the cluster


def note(line: str) -> None:
    """Write down what was begun."""
    log = _plan().get("log")
    if log:
        with open(log, "a") as file:
            file.write(f"{line}\n")


def drive(job: str, settings: str) -> None:
    """The driver that is to be killed, as a process of its own."""
    _connect()
    arm()
    _write_plan({**_plan(), "driver": os.getpid()})
    kind = _JOBS[job.removesuffix(ON_S3)][0]
    _run(job, kind.model_validate_json(settings))


def _kill(
    job: str,
    moment: str,
    victim: str,
    config: JobConfig,
    notes: Path,
    undisturbed: tuple[JobConfig, Manifest],
    designer: Designer,
) -> Cell:
    log, token = notes.with_suffix(".log"), notes.with_suffix(".token")
    plan = {"moment": moment, "victim": victim, "token": str(token), "log": str(log)}
    _write_plan(plan)
    designer.answered.clear()
    if victim == DRIVER:
        command = [sys.executable, "-m", "benchmarks.kills", "--drive", job]
        address = ray.get_runtime_context().gcs_address
        done = subprocess.run(
            command,
            input=config.model_dump_json(),
            text=True,
            env={**os.environ, "RAY_ADDRESS": address},
            capture_output=True,
            timeout=_PATIENCE_S,
        )
        if done.returncode != -signal.SIGKILL:
            raise RuntimeError(f"{job} was not killed {moment}: {done.stderr}")
        time.sleep(_WAIT_S)
    _write_plan({**plan, "moment": moment if victim == WORKER else None})
    made = _run(job, config)
    if not token.exists():
        raise RuntimeError(f"{job} was not killed {moment}")
    (wanted, whole), store = undisturbed, storage.open_store(config.out)
    ids, ids_wanted = _ids(store, made), _ids(storage.open_store(wanted.out), whole)
    kept = Counter(entry.key for entry in read_entries(store))
    paid_again, cut_off = designer.asked_again(token.stat().st_mtime)
    return Cell(
        job,
        moment,
        victim,
        same=made.counts == whole.counts
        and _files(store, made) == _files(storage.open_store(wanted.out), whole),
        lost=(ids_wanted - ids).total(),
        doubled=(ids - ids_wanted).total(),
        paid_again=max(paid_again, kept.total() - len(kept)),
        cut_off=cut_off,
        done_again=sum(count - 1 for count in Counter(log.read_text().splitlines()).values()),
    )


def _files(store: Store, made: Manifest) -> list[tuple[str, bytes]]:
    """Every file that the manifest names, and the names of what else is there but for answers."""
    named = [(file.path, store.read(file.path)) for file in made.files]
    paths = {path for path, _ in named}
    others = (name for name, _ in store.list() if name not in paths)
    return [*named, *((name, b"") for name in others if not name.startswith("answers/"))]


def _ids(store: Store, made: Manifest) -> Counter[str]:
    """How often each record is in the output."""
    ids: Counter[str] = Counter()
    for file in made.files:
        with store.open_parquet(file.path) as parquet:
            ids.update(parquet.read(columns=["id"])["id"].to_pylist())
    return ids


@dataclass
class Designer:
    """A server that answers everything.

    Attributes:
        url: its address.
        answered: what it was asked, as a hash, and when it answered, in seconds since 1970.
    """

    url: str
    answered: list[tuple[str, float]] = field(default_factory=list)

    def asked_again(self, killed: float) -> tuple[int, int]:
        """How often it was asked what it had answered: well before the kill, and else."""
        first: dict[str, float] = {}
        old = fresh = 0
        for question, at in self.answered:
            if question not in first:
                first[question] = at
            elif first[question] < killed - _FRESH_S:
                old += 1
            else:
                fresh += 1
        return old, fresh


@contextmanager
def _designer() -> Iterator[Designer]:
    plan = Blueprint("Add a red box.", "A table.", "- a table", "The left.", "A table with a box.")
    text = f"Alignment: aligned\n\n{plan.render()}"
    answer = {
        "choices": [{"finish_reason": "stop", "message": {"content": text}}],
        "usage": {"prompt_tokens": 10, "completion_tokens": 10},
    }
    body = json.dumps(answer).encode()

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            question = self.rfile.read(int(self.headers["Content-Length"]))
            time.sleep(_ANSWER_S)
            designer.answered.append((hashlib.sha256(question).hexdigest(), time.time()))
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    designer = Designer(f"http://127.0.0.1:{server.server_address[1]}/v1")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield designer
    finally:
        server.shutdown()


def _settings_at(settings: Callable[[str], JobConfig], outputs: str, name: str) -> JobConfig:
    return settings(f"{outputs}/{name}")


def _inputs(
    folder: Path, designer: Designer, jobs: Iterable[str]
) -> dict[str, Callable[[str], JobConfig]]:
    """Make what the jobs read; returns the settings of each for the address of an output."""
    jobs = {job.removesuffix(ON_S3) for job in jobs}
    pairs, images, edits = (str(folder / name) for name in ("pairs", "images", "edits"))
    small: dict[str, Any] = {"rows_per_file": RANGE}
    ingest.run(ingest.IngestConfig(tabletop=RECORDS, size=64, out=pairs, **small))
    if "t2i" in jobs:
        ingest.run(ingest.IngestConfig(tabletop_images=RECORDS, size=64, out=images, **small))
    asking: dict[str, Any] = {**small, "batch_size": 2, "duplicates": _ALIKE}

    def settings_of_edit(out: str, spec: str = f"openai:m@{designer.url}") -> edit.EditConfig:
        calls = CallOptions(in_flight=_CALLS_AT_ONCE)
        return edit.EditConfig(
            raw=pairs, out=out, designer=spec, filters=_PAIRS, calls=calls, **asking
        )

    if "features" in jobs:
        edit.run(settings_of_edit(edits, "oracle"))
    model = str(ROOT / "configs/tiny.yaml")
    return {
        "ingest": lambda out: ingest.IngestConfig(tabletop=RECORDS, size=64, out=out, **small),
        "filter": lambda out: filter.FilterPairsConfig(
            raw=pairs, out=out, filters=_PAIRS, **asking
        ),
        "edit": settings_of_edit,
        "t2i": lambda out: t2i.T2IConfig(
            raw=images,
            out=out,
            captioner="oracle",
            filters=_IMAGES,
            captions=_CAPTIONS,
            **asking,
        ),
        "features": lambda out: features.FeaturesConfig(
            data=edits, out=out, model=model, encode_batch=2, cpus_per_worker=0.5, **small
        ),
    }


_JOBS: dict[str, tuple[type[JobConfig], Callable[[Any], Manifest]]] = {
    "ingest": (ingest.IngestConfig, ingest.run),
    "filter": (filter.FilterPairsConfig, filter.run),
    "edit": (edit.EditConfig, edit.run),
    "t2i": (t2i.T2IConfig, t2i.run),
    "features": (features.FeaturesConfig, features.run),
}
_WHERE = [f"{job}{where}" for job in _JOBS for where in ("", ON_S3)]


def _run(job: str, config: JobConfig) -> Manifest:
    return _JOBS[job.removesuffix(ON_S3)][1](config)


def _connect() -> None:
    """Join the cluster that ``RAY_ADDRESS`` names or start one, with workers that are armed."""
    if not ray.is_initialized():
        ray.init(
            address=os.environ.get("RAY_ADDRESS", "local"),
            num_cpus=None if "RAY_ADDRESS" in os.environ else max(2, os.cpu_count() or 1),
            include_dashboard=False,
            log_to_driver=False,
            runtime_env={
                "worker_process_setup_hook": "benchmarks.kills.arm",
                # The hook lies in the checkout, which workers do not look into by themselves.
                "env_vars": {PLAN: os.environ[PLAN], "PYTHONPATH": str(ROOT)},
            },
        )
    connect()


def _plan() -> dict[str, Any]:
    path = Path(os.environ.get(PLAN, ""))
    return json.loads(path.read_text()) if path.is_file() else {}


def _write_plan(plan: dict[str, Any]) -> None:
    path = Path(os.environ[PLAN])
    new = path.with_suffix(".new")
    new.write_text(json.dumps(plan))
    new.replace(path)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--jobs", nargs="+", choices=_WHERE, default=_WHERE)
    parser.add_argument("--moments", nargs="+", choices=MOMENTS, default=list(MOMENTS))
    parser.add_argument("--docs", action="store_true", help="put the rows into the documentation")
    parser.add_argument(
        "--folder", help="where outputs lie meanwhile; a temporary one unless given"
    )
    return parser.parse_args()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drive"]:
        drive(sys.argv[2], sys.stdin.read())
    else:
        sys.exit(main())
