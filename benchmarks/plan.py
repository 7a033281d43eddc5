"""Whether the model behind `dim plan` predicts runs that are really made, and the costs it knows.

    python -m benchmarks.plan                 # measure small runs, predict two larger ones
    python -m benchmarks.plan --write configs/plan-costs.yaml   # measure what `dim plan` knows

The first command takes tabletop pairs in, filters them and has blueprints written, several times:
fewer and more records, in fewer and more ranges. From these it fits what each job costs once, for a
range and for a record, predicts runs of ``--predict`` pairs, makes them, and leaves with status 1
when anything is more than 20 % off. Compared are CPU seconds of the driver and all of its Ray's
processes (which other work on the machine hardly changes, as it does the clock), bytes and requests
at the object store, calls to the designer, and the driver's memory. Objects that hold answers are
left out, for they are written by the second and not by the record.

The second does the same with pictures of 512 px, pairs and images, for the cost of each, and with
some thousand tabletop records for what the driver holds of one.

Every run is a process of its own with a Ray of its own; with ``--runs FILE`` a call that was ended
goes on after the last one. The object store (moto's) and the designer, which gives everybody the
same good answer, run in this process and are not counted.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote
from urllib.request import urlopen

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from rich.console import Console
from rich.table import Table

from dim.blueprint import Blueprint
from workflows.scaling.costs import Amounts, Costs, JobCost, Run, fit, load_costs, ranges_for

TOLERANCE = 0.20
SMALL = ((100, 4), (1_000, 4), (1_000, 8), (1_000, 16))
"""Tabletop records and ranges of the runs that are fitted. There are as many ranges as cores at
least, for a job cuts the last ones of each core further, and no range has more than the 256 records
at which jobs cut small inputs themselves. What a thousand records cost is well above what one run
differs from the next by."""
PICTURES = ((96, 4), (384, 2), (384, 4), (384, 12))
"""The same of pictures of 512 px."""
SIDE = 512
CORES = max(2, os.cpu_count() or 1)  # of the Ray that a job starts
DRIVER = (5_000, 25_000)
"""Tabletop records of the runs from which the memory of drivers is known. Up to a few thousand it
grows by what Ray and Arrow take for themselves once there is work, several times as fast."""
COMMAND = "python -m benchmarks.plan --write configs/plan-costs.yaml"

_SAMPLE_S = 0.1
_DRAWN = ("tabletop", "scenes")
KINDS = ("pairs", "images", "driver")
_CHAINS = {
    "tabletop": ("ingest-pairs", "filter-pairs", "edit"),
    "scenes": ("ingest-pairs", "filter-pairs"),
    "pairs": ("ingest-pairs", "filter-pairs", "edit"),
    "images": ("ingest-images", "filter-images", "t2i"),
}
_DRIVERS = {
    "ingest-pairs": ("ingest-pairs", "ingest-images"),
    "filter-pairs": ("filter-pairs", "filter-images", "edit", "t2i"),  # which all filter
}
_AWS = {
    "AWS_ACCESS_KEY_ID": "bench",
    "AWS_SECRET_ACCESS_KEY": "bench",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
_PLAN = Blueprint(
    instruction="Add a red box to the left of the cup.",
    global_layout="A table under a plain wall. " * 8,
    local_objects="A cup stands in the middle, and a plate lies beside it. " * 6,
    edit_area="The free part of the table at the left. " * 4,
    imagination="A red box stands at the left of the cup, and all else is as it was. " * 6,
).render()
_VERDICT = (
    "Differences: a red box.\nAlignment: aligned\nInstruction: Add a red box to the cup's left."
)
_CAPTION = (
    "A calm field of green colours lies under a wide blue sky. Two trees stand to the left of a "
    "wooden house with a rough stone wall. The soft light of a sunny morning falls on the scene "
    "from above, and the mood is quiet. Far behind the house rise three grey hills."
)


class Servers(NamedTuple):
    """The object store and the designer, and what was counted of them."""

    store: str
    designer: str
    counts: Counter[str]
    marks: dict[str, Callable[[], None]]


class Bench(NamedTuple):
    """Where runs are made; ``runs`` is a file of those that are known, one a line."""

    folder: Path
    servers: Servers
    runs: Path | None = None

    def known(self, what: str) -> dict[str, Amounts] | None:
        """What a run took that was made before."""
        if self.runs is None or not self.runs.exists():
            return None
        lines = [json.loads(line) for line in self.runs.read_text().splitlines()]
        found = [line["took"] for line in lines if line["run"] == what]
        return {job: Amounts(**took) for job, took in found[-1].items()} if found else None

    def note(self, what: str, took: dict[str, Amounts]) -> None:
        """Keep what a run took."""
        values = {job: amounts.model_dump() for job, amounts in took.items()}
        if self.runs is not None:
            with self.runs.open("a") as file:
                file.write(json.dumps({"run": what, "took": values}) + "\n")


def main() -> int:
    """Check the model, or measure the costs; returns the exit status."""
    options = _options()
    if options.chain is not None:
        _chain(json.loads(options.chain))
        return 0
    if options.watch is not None:
        _watch(options.watch)
        return 0
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, _servers() as servers:
        bench = Bench(Path(name), servers, options.runs)
        if options.write is not None:
            jobs = measure_costs(bench, options.small or PICTURES, options.only)
            write_costs(Path(options.write), jobs)
            console.print(f"{options.write}: {', '.join(jobs)}")
            return 0
        known = fit_chain("tabletop", bench, options.small or SMALL)
        worst = 0.0
        for pairs in options.predict:
            took = run_chain("tabletop", pairs, None, bench)
            table, off = compare(known, pairs, took)
            console.print(table)
            worst = max(worst, off)
    console.print(f"at most {worst:.0%} off, where {TOLERANCE:.0%} are allowed")
    return int(worst > TOLERANCE)


def compare(
    known: dict[str, JobCost], records: int, took: dict[str, Amounts]
) -> tuple[Table, float]:
    """What was predicted of a run beside what it took, and how far the worst of it is off.

    The jobs together, for a job of some seconds is mostly the start of its processes; memory is
    that of the largest driver.
    """
    predicted: dict[str, list[float]] = {name: [] for name in Amounts.model_fields}
    measured: dict[str, list[float]] = {name: [] for name in Amounts.model_fields}
    for job, found in took.items():
        guess = known[job].of(records, ranges_for(job, records), CORES)
        for name in Amounts.model_fields:
            predicted[name].append(getattr(guess, name))
            measured[name].append(getattr(found, name))
    table = Table("", "predicted", "measured", "off", title=f"{records:,} pairs")
    worst = 0.0
    for name in Amounts.model_fields:
        whole = max if name == "driver_bytes" else sum
        guess, found = whole(predicted[name]), whole(measured[name])
        off = abs(guess - found) / found if found else 0.0
        worst = max(worst, off)
        table.add_row(name.replace("_", " "), f"{guess:,.1f}", f"{found:,.1f}", f"{off:.1%}")
    return table, worst


def fit_chain(kind: str, bench: Bench, small: Sequence[tuple[int, int]]) -> dict[str, JobCost]:
    """What each job of a chain costs, from small runs of it."""
    runs: dict[str, list[Run]] = {job: [] for job in _CHAINS[kind]}
    for records, ranges in small:
        for job, took in run_chain(kind, records, ranges, bench).items():
            runs[job].append(Run(records, ranges, CORES, took))
    return {job: fit(found) for job, found in runs.items()}


def measure_costs(
    bench: Bench, small: Sequence[tuple[int, int]], only: Sequence[str]
) -> dict[str, JobCost]:
    """The costs of all jobs with pictures of 512 px; of the driver's memory, by many small ones.

    ``only`` names what is measured: ``pairs``, ``images``, ``driver``.
    """
    jobs: dict[str, JobCost] = {}
    for kind in ("pairs", "images"):
        if kind in only:
            jobs |= fit_chain(kind, bench, small)
    if "driver" not in only:
        return jobs
    few, many = (run_chain("scenes", records, None, bench) for records in DRIVER)
    for job, names in _DRIVERS.items():
        grown = max(0.0, many[job].driver_bytes - few[job].driver_bytes) / (DRIVER[1] - DRIVER[0])
        held = {"once": few[job].driver_bytes, "a_record": grown}
        for name in names:
            jobs[name] = _with_driver(jobs.get(name, JobCost()), held)
    return jobs


def write_costs(file: Path, measured: dict[str, JobCost]) -> None:
    """Put what was measured now into a file of costs, beside what it has of earlier runs."""
    jobs = dict(load_costs(file).jobs) if file.exists() else {}
    for name, cost in measured.items():
        before = jobs.get(name, JobCost())
        if _is_memory_alone(cost):
            jobs[name] = _with_driver(before, _memory_of(cost))
        else:
            jobs[name] = _with_driver(cost, _memory_of(before))
    costs = Costs(
        command=COMMAND,
        date=datetime.now(UTC).date(),
        machine=_machine(),
        megapixels=round(SIDE**2 / 1e6, 4),
        jobs=jobs,
    )
    file.write_text(_as_yaml(costs))


def _is_memory_alone(cost: JobCost) -> bool:
    parts = (getattr(cost, part) for part in JobCost.model_fields)
    return not any(
        part.model_dump(exclude={"driver_bytes"}, exclude_defaults=True) for part in parts
    )


def _memory_of(cost: JobCost) -> dict[str, float]:
    return {part: getattr(cost, part).driver_bytes for part in ("once", "a_record")}


def _with_driver(cost: JobCost, held: dict[str, float]) -> JobCost:
    """The cost with other memory of the driver: what it holds once, and of a record."""
    parts = {name: getattr(cost, name) for name in JobCost.model_fields}
    return JobCost(
        **{
            name: part.model_copy(update={"driver_bytes": held.get(name, 0.0)})
            for name, part in parts.items()
        }
    )


def run_chain(
    kind: str,
    records: int,
    ranges: int | None,
    bench: Bench,
) -> dict[str, Amounts]:
    """What each job of a chain took, made in a process of its own unless it is known already.

    Args:
        kind: which chain.
        records: of its input.
        ranges: into which every job cuts it; ``None``: as it does by itself.
        bench: where it is made.
    """
    what = f"{kind} {records} {ranges}"
    if (known := bench.known(what)) is not None:
        return known
    servers = bench.servers
    source = None if kind in _DRAWN else _pictures(bench.folder, kind, records, servers)
    spec = {
        "kind": kind,
        "records": records,
        "rows_per_file": None if ranges is None else -(-records // ranges),
        "source": source,
        "designer": f"openai:m@{servers.designer}/v1",
        "mark": servers.designer,
        "out": f"s3://bench/{kind}-{records}-{ranges}-{time.time_ns()}",
    }
    environment = {**os.environ, **_AWS, "AWS_ENDPOINT_URL": servers.store, "OMP_NUM_THREADS": "1"}
    environment["OPENAI_API_KEY"] = "none"
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.plan", "--chain", json.dumps(spec)], env=environment
    )
    watch = _Watch(child.pid, servers.counts)
    servers.marks["now"] = watch.mark
    try:
        if child.wait() != 0:
            raise SystemExit(f"{spec} ended with status {child.returncode}")
    finally:
        child.kill()
        watch.stop()
    took = dict(zip(_CHAINS[kind], watch.between(), strict=True))
    bench.note(what, took)
    return took


class _Watch:
    """What a process and all below it take, looked at from outside; marks divide it into jobs.

    Who looks is a process of its own: threads beside busy servers would look too late, and miss
    what a worker did before it ended.
    """

    def __init__(self, pid: int, counts: Counter[str]) -> None:
        self._counts = counts
        self._marks: list[dict[str, float]] = []
        command = [sys.executable, "-m", "benchmarks.plan", "--watch", str(pid)]
        self._looks = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def mark(self) -> None:
        """A job has begun or ended."""
        assert self._looks.stdin is not None and self._looks.stdout is not None
        self._looks.stdin.write("now\n")
        self._looks.stdin.flush()
        self._marks.append({**json.loads(self._looks.stdout.readline()), **self._counts})

    def between(self) -> Iterator[Amounts]:
        """What each job took."""
        for before, after in pairwise(self._marks):
            differences = {
                name: after.get(name, 0) - before.get(name, 0)
                for name in Amounts.model_fields
                if name != "driver_bytes"
            }
            yield Amounts(**differences, driver_bytes=after["driver_bytes"])

    def stop(self) -> None:
        """Look no more."""
        self._looks.kill()
        self._looks.wait()


def _watch(pid: int) -> None:
    """Look at a process and all below it; at every line that is read, say what was seen."""
    root = psutil.Process(pid)
    cpu: dict[tuple[int, float], float] = {}
    peak = 0.0
    while True:
        asked = select.select([sys.stdin], [], [], _SAMPLE_S)[0]
        for process in [root, *root.children(recursive=True)]:
            try:
                times = process.cpu_times()
                cpu[process.pid, process.create_time()] = times.user + times.system
                if process == root:
                    peak = max(peak, process.memory_info().rss)
            except psutil.Error:  # it has just ended
                continue
        if asked:
            if not sys.stdin.readline():
                return
            print(json.dumps({"cpu_seconds": sum(cpu.values()), "driver_bytes": peak}), flush=True)
            peak = 0.0


def _chain(spec: dict[str, Any]) -> None:
    """Make the jobs of a chain, one after the other, in this process."""
    from dim.config import load_config, read_yaml
    from pipelines import edit, filter, ingest, t2i
    from pipelines.cluster import connect

    connect()
    images, kind, out = spec["kind"] == "images", spec["kind"], spec["out"]
    rows = [] if spec["rows_per_file"] is None else [f"rows_per_file={spec['rows_per_file']}"]
    rules = "configs/data-tabletop-edit.yaml" if kind in _DRAWN else None
    # The bench's pictures are no photographs: of each all must go all the way.
    loose = [] if kind in _DRAWN else ["filters.max_text_area=null", "filters.min_side=null"]
    mark = partial(urlopen, f"{spec['mark']}/mark", b"")
    if kind in _DRAWN:
        given = [f"tabletop={spec['records']}"]
    else:
        given = [f"{kind}={spec['source']}", *([] if images else ["layout=ultraedit"])]
    mark().close()
    done = ingest.run(load_config(ingest.IngestConfig, None, [f"out={out}/raw", *given, *rows]))
    mark().close()
    kept = filter.FilterImagesConfig if images else filter.FilterPairsConfig
    told = [f"raw={out}/raw", f"out={out}/filtered", *rows, *loose]
    if rules is not None:  # what the file has for the filter job too
        values = read_yaml(Path(rules))
        told += [f"{name}={json.dumps(values[name])}" for name in ("filters", "duplicates")]
    done = filter.run(load_config(kept, None, told))
    told = [f"raw={out}/filtered", f"out={out}/made", *rows, *loose]
    if images:
        mark().close()
        done = t2i.run(load_config(t2i.T2IConfig, None, [*told, f"captioner={spec['designer']}"]))
    elif kind != "scenes":
        mark().close()
        told = [*told, "workers=1", f"designer={spec['designer']}"]  # however many records
        done = edit.run(load_config(edit.EditConfig, rules, told))
    mark().close()
    if done.counts.kept < 0.9 * spec["records"]:
        raise SystemExit(f"most should be kept: {done.counts.in_words()}")


def _pictures(folder: Path, kind: str, count: int, servers: Servers) -> str:
    """A Parquet file in the object store with ``count`` pairs of JPEG files, or images."""
    import boto3

    name = f"sources/{kind}-{count}/part.parquet"
    path = folder / f"{kind}-{count}.parquet"
    if not path.exists():
        rows = []
        for number in range(count):
            source, target = _pair(number)
            pair = {"source_image": {"bytes": source, "path": None},
                    "edited_image": {"bytes": target, "path": None},
                    "edit_prompt": f"Add red box number {number}."}  # fmt: skip
            rows.append(pair if kind == "pairs" else {"image": {"bytes": source, "path": None}})
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=64)
        boto3.client("s3", endpoint_url=servers.store).upload_file(str(path), "bench", name)
    return f"s3://bench/{name.rpartition('/')[0]}"


def _pair(number: int) -> tuple[bytes, bytes]:
    """A picture with detail at several scales, and the same with a box in it."""
    rng = np.random.default_rng(number)
    size, coarse = (SIDE, SIDE), []
    for cells in (6, 48, SIDE // 3):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        coarse.append(noise.resize(size, Image.Resampling.BILINEAR))
    source = Image.blend(Image.blend(coarse[2], coarse[1], 0.5), coarse[0], 0.5)
    target = source.copy()
    left, top = (int(place) for place in rng.integers(0, SIDE * 2 // 3, 2))
    target.paste((255, 0, 0), (left, top, left + SIDE // 4, top + SIDE // 4))
    encoded = []
    for image in (source, target):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded[0], encoded[1]


@contextmanager
def _servers() -> Iterator[Servers]:
    """An object store and a designer on free ports, both counting."""
    import boto3
    from moto.moto_server.werkzeug_app import (
        DomainDispatcherApplication,
        MotoRequestHandler,
        create_backend_app,
    )
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # a line a request
    counts: Counter[str] = Counter()
    lock = threading.Lock()
    backend = DomainDispatcherApplication(create_backend_app)

    def counted(environment: dict[str, Any], start: Callable[..., Any]) -> Any:
        path = f"{environment['PATH_INFO']}?{unquote(environment.get('QUERY_STRING', ''))}"
        if "/answers" in path:  # how many objects they are follows the time, and not the records
            return backend(environment, start)
        reading = environment["REQUEST_METHOD"] in ("GET", "HEAD")
        sent = int(environment.get("CONTENT_LENGTH") or 0)

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            length = next((int(v) for k, v in headers if k.lower() == "content-length"), 0)
            received = length if environment["REQUEST_METHOD"] == "GET" else 0
            with lock:
                counts.update(reads=int(reading), writes=int(not reading))
                counts.update(read_bytes=received, written_bytes=0 if reading else sent)
            return start(status, headers, *rest)

        return backend(environment, begin)

    store = make_server("127.0.0.1", 0, counted, True, request_handler=MotoRequestHandler)
    marks: dict[str, Callable[[], None]] = {}
    designer = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Designer, counts, lock, marks))
    designer.daemon_threads = True
    for server in (store, designer):
        threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{store.server_address[1]}"
    os.environ.update(_AWS)
    boto3.client("s3", endpoint_url=address).create_bucket(Bucket="bench")
    try:
        yield Servers(address, f"http://127.0.0.1:{designer.server_address[1]}", counts, marks)
    finally:
        store.shutdown()
        designer.shutdown()


class _Designer(BaseHTTPRequestHandler):
    """Answers every question well."""

    protocol_version = "HTTP/1.1"

    def __init__(
        self,
        counts: Counter[str],
        lock: threading.Lock,
        marks: dict[str, Callable[[], None]],
        *rest: Any,
    ) -> None:
        self._counted, self._lock, self._marks = counts, lock, marks
        super().__init__(*rest)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/mark":
            self._marks["now"]()
            self._answer(b"")
            return
        with self._lock:
            self._counted["calls"] += 1
        text = _PLAN
        if b"Describe the attached image" in body:
            text = _CAPTION
        elif b"Differences: every visible change" in body:
            text = _VERDICT
        message = {"finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1500, "completion_tokens": 300}
        self._answer(json.dumps({"choices": [message], "usage": usage}).encode())

    def _answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _as_yaml(costs: Costs) -> str:
    head = "# What the data jobs cost, as the command below measured it. Read by `dim plan`.\n"
    values = costs.model_dump(mode="json")
    for job in values["jobs"].values():
        for part in job.values():
            for name in list(part):
                part[name] = float(f"{part[name]:.4g}")
    return head + yaml.safe_dump(values, sort_keys=False)


def _machine() -> str:
    names = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((n.partition(": ")[2] for n in names if n.startswith("model name")), "CPU")
    memory = psutil.virtual_memory().total / 1e9
    return f"{os.cpu_count()} cores of {model}, {memory:.0f} GB, with other work on it"


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--predict", type=int, nargs="+", default=[2_000, 4_000])
    parser.add_argument("--write", help="measure the costs of photographs into this file")
    parser.add_argument(
        "--only", nargs="+", choices=KINDS, default=KINDS, help="with --write: some of the costs"
    )
    parser.add_argument(
        "--runs",
        type=Path,
        help="a file that keeps every run, from which a later call goes on",
    )
    parser.add_argument("--folder", help="for the pictures; default: a temporary one")
    parser.add_argument("--chain", help=argparse.SUPPRESS)  # one run, in a process of its own
    parser.add_argument("--watch", type=int, help=argparse.SUPPRESS)  # a process, by its id
    parser.add_argument(
        "--small",
        type=lambda text: tuple(map(int, text.split("x"))),
        nargs="+",
        help="RECORDSxRANGES of the runs that are fitted",
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
