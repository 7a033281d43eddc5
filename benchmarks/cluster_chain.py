"""The whole loop through the job API, each job with what it took, and every job once more."""

from __future__ import annotations

import base64
import io
import json
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import boto3
import yaml
from PIL import Image

from benchmarks.cluster_head import BUCKET, ROOT, Head, Site, told, wait_for
from infra.ports import free_port
from tests.rclone_server import ACCESS_KEY, SECRET_KEY

PAIRS, HELD_OUT, IMAGES = 64, 16, 32
TOGETHER = (
    ("ingest pairs", "ingest held-out", "ingest images"),
    ("filter", "edit held-out", "t2i"),
    ("edit",),
    ("features", "train t2i"),
    ("train edit1",),
    ("train edit2",),
    ("evaluate",),
    ("register",),
)
"""Jobs that do not wait for one another, in order."""

ALL_KEPT = " 0 rejected, 0 failed"
"""What a data job says of its records."""

ROUNDS = 3
"""Of a job that finds its work done, to see what the job API costs."""

_REGISTER = """\
out: {store}/loop
steps:
  register:
    run: register
    with:
      stage: {store}/edit2
      alias: released
      evaluation: {store}/evaluation
      at_least: {{exact/blueprint: 0.0}}
"""
_AT_A_TIME = 4
_SMALL = ["steps=6", "batch_size=8", "workers=1", "checkpoint_every=3"]


@dataclass(frozen=True)
class Job:
    """A job that was followed to its end.

    Attributes:
        name: of its step.
        code: its exit code, as ``dim submit`` gave it.
        whole_s: from the call of ``dim submit`` to its end.
        driver_s: of the job's own program, by the job server.
        log, said: what it said, and what ``dim submit`` said of it.
    """

    name: str
    code: int
    whole_s: float
    driver_s: float
    log: str
    said: str

    @property
    def id(self) -> str:
        """The job server's name of it."""
        found = re.search(r"submitted (raysubmit_\w+)", self.said)
        if found is None:
            raise RuntimeError(f"{self.name} was not submitted: {self.said}")
        return found[1]


def chain(store: str) -> dict[str, list[str]]:
    """The commands of the loop, by step, in order."""
    filters = ["--config", "configs/data-tabletop-edit.yaml"]
    small = ["rows_per_file=16"]
    rules = told(yaml.safe_load((ROOT / filters[1]).read_text())["filters"])

    def ingest(out: str, *what: str) -> list[str]:
        return ["data", "ingest", *what, "--size", "64", "--out", f"{store}/{out}", *small]

    def edit(raw: str, out: str) -> list[str]:
        return ["data", "edit", *filters, "--raw", f"{store}/{raw}", "--designer", "oracle",
                "--out", f"{store}/{out}", *small]  # fmt: skip

    def train(stage: str, init: str, data: str, *others: str) -> list[str]:
        return ["train", f"configs/tiny-{stage}.yaml", f"init={init}", f"data=[{store}/{data}]",
                f"out={store}/{stage}", *_SMALL, *others]  # fmt: skip

    held_out = told({"data": [f"{store}/held-out"], "samples": 4, "steps": 2})
    return {
        "ingest pairs": ingest("raw", "--tabletop", str(PAIRS)),
        "ingest held-out": ingest("raw-held-out", "--tabletop", str(HELD_OUT), "--seed", "1"),
        "ingest images": ingest("raw-images", "--tabletop-images", str(IMAGES), "--seed", "2"),
        "filter": ["data", "filter", "--raw", f"{store}/raw", "--out", f"{store}/filtered",
                   f"filters={rules}", "duplicates.max_distance=null", *small],
        "edit": edit("filtered", "edits"),
        "edit held-out": edit("raw-held-out", "held-out"),
        "t2i": ["data", "t2i", "--config", "configs/data-tabletop-t2i.yaml", "--raw",
                f"{store}/raw-images", "--captioner", "oracle", "--out", f"{store}/captions",
                *small],
        "features": ["data", "features", "--stage", "configs/tiny-edit2.yaml", "--model",
                     "configs/tiny.yaml", "--data", f"{store}/edits", "--out",
                     f"{store}/features", *small],
        "train t2i": train("t2i", "configs/tiny.yaml", "captions"),
        "train edit1": train("edit1", f"{store}/t2i/model", "features"),
        "train edit2": train("edit2", "models:/dim@edit1", "features", f"validation={held_out}"),
        "evaluate": ["evaluate", "--model", "models:/dim@edit2", "--data", f"{store}/held-out",
                     "--out", f"{store}/evaluation", "steps=4", "workers=1"],
        "register": ["run", "register.yaml"],
    }  # fmt: skip


def run_chain(head: Head) -> None:
    """The loop, job by job; prints a table, and the time to the first record.

    Raises:
        RuntimeError: something was not as it is to be.
    """
    check_failure(head)
    commands, released = chain(head.site.store), _releasing(head.site)
    first = first_record(head, Store(head.site), commands["ingest pairs"])
    print(f"from submit to the first range of records: {first:.1f} s\n")
    print("| job | `dim submit`, s | of it the job's program, s |\n| --- | ---: | ---: |")
    for names in TOGETHER:
        for job in _side_by_side(head, {name: commands[name] for name in names}, released):
            print(f"| {job.name} | {job.whole_s:.1f} | {job.driver_s:.1f} |", flush=True)


def run_again(head: Head) -> None:
    """The jobs of a loop that is done once more; what the job API costs; an edit by what came out.

    Raises:
        RuntimeError: something was done twice, or not as it is to be.
    """
    store, commands = Store(head.site), chain(head.site.store)
    before, began = store.snapshot(), time.monotonic()
    check(any(what == "version" for what, _ in before), "the loop is not done: run the part chain")
    _side_by_side(head, commands, _releasing(head.site))
    changed = before.symmetric_difference(store.snapshot())
    check(not changed, f"submitted again, something was done twice: {sorted(changed)[:4]}")
    print(f"all {len(commands)} jobs again: {time.monotonic() - began:.0f} s, nothing is written")
    print_overhead(head, commands["ingest pairs"])
    serve(head)


def _releasing(site: Site) -> Path:
    """A folder with nothing but the workflow that releases: the cluster has all else."""
    folder = site.folder / "release"
    folder.mkdir(exist_ok=True)
    (folder / "register.yaml").write_text(_REGISTER.format(store=site.store))
    return folder


def _side_by_side(head: Head, commands: Mapping[str, Sequence[str]], released: Path) -> list[Job]:
    def one(name: str) -> Job:
        job = follow(head, name, commands[name], released if name == "register" else ROOT)
        check(job.code == 0, f"{name} ended with {job.code}: {job.said}\n{job.log}")
        return job

    with ThreadPoolExecutor(_AT_A_TIME) as pool:
        return list(pool.map(one, commands))


def first_record(head: Head, store: Store, command: Sequence[str]) -> float:
    """Seconds from the call of ``dim submit`` to the first range of the output; ends that job.

    That it goes on when ``dim submit`` is interrupted is looked at here: it is followed again.
    """
    out = "first"
    chosen = [*command[: command.index("--out")], "--out", f"{head.site.store}/{out}",
              *command[command.index("--out") + 2 :], "rows_per_file=4"]  # fmt: skip
    began = time.monotonic()
    following = head.submit(*chosen)
    try:
        wait_for(lambda: bool(store.keys(f"{out}/ranges/")), "a range of records", following)
        took = time.monotonic() - began
        following.send_signal(signal.SIGINT)
        _, said = following.communicate(timeout=60)
    finally:
        following.kill()
    check(following.returncode == 130, f"Ctrl-C ended with {following.returncode}: {said}")
    job = re.search(r"submitted (raysubmit_\w+)", said)
    assert job is not None
    check(f"dim submit --attach {job[1]}" in said, f"Ctrl-C says {said}")
    again = head.dim(["--attach", job[1]])
    log, said = again.communicate(timeout=300)
    check(again.returncode == 0, f"followed again, it ended with {again.returncode}: {said}{log}")
    check(f"{PAIRS} " in log, f"the log of the job that was left: {log}")
    return took


def follow(head: Head, name: str, command: Sequence[str], folder: Path = ROOT) -> Job:
    """Submit a job from ``folder`` and follow it to its end."""
    began = time.monotonic()
    process = head.dim(["--working-dir", str(folder), "--", *command])
    log, said = process.communicate(timeout=500)
    whole = time.monotonic() - began
    job = Job(name, process.returncode, whole, 0.0, log, said)
    info = head.jobs().get_job_info(job.id)
    driver_s = ((info.end_time or 0) - (info.start_time or 0)) / 1000
    return Job(name, process.returncode, whole, driver_s, log, said)


def print_overhead(head: Head, command: Sequence[str]) -> None:
    """What the job API costs: a job that finds its work done, and the same program by itself."""
    module = {"ingest": "pipelines.ingest"}[command[1]]
    environment = {**head.site.environment, "RAY_ADDRESS": head.gcs, "RAY_AUTH_MODE": "token"}
    alone, submitted = [], []
    for _ in range(ROUNDS):
        began = time.monotonic()
        subprocess.run(
            [sys.executable, "-m", module, *command[2:]], env=environment, cwd=ROOT, check=True,
            capture_output=True,
        )  # fmt: skip
        alone.append(time.monotonic() - began)
        submitted.append(follow(head, "ingest", command).whole_s)
    by_itself, as_job = statistics.median(alone), statistics.median(submitted)
    print(
        f"a finished ingest: {by_itself:.1f} s by itself, {as_job:.1f} s as a job: the job API "
        f"costs {as_job - by_itself:.1f} s (medians of {ROUNDS})",
        flush=True,
    )


def make_edits(head: Head, records: int) -> None:
    """Edits of the tabletop in the site's store, in ranges of eight."""
    store = head.site.store
    commands = {
        "ingest": ["data", "ingest", "--tabletop", str(records), "--size", "64", "--out",
                   f"{store}/raw", "rows_per_file=8"],
        "edit": ["data", "edit", "--config", "configs/data-tabletop-edit.yaml", "--raw",
                 f"{store}/raw", "--designer", "oracle", "--out", f"{store}/edits",
                 "rows_per_file=8"],
    }  # fmt: skip
    for name, command in commands.items():
        job = follow(head, name, command, ROOT)
        check(job.code == 0, f"{name}: {job.said}{job.log}")


def check_failure(head: Head) -> None:
    """A job that fails gives its exit code and its own sentence."""
    job = follow(head, "nonsense", ["doctor", "--nonsense"])
    check(job.code == 2, f"a job of wrong usage ended with {job.code}")
    job = follow(head, "missing", ["data", "edit", "--raw", f"{head.site.store}/none", "--out",
                                   f"{head.site.store}/never", "--designer", "oracle"])  # fmt: skip
    check(job.code == 1 and "error: " in job.log, f"a job that fails: {job.code} {job.log}")
    check("Traceback" not in job.log + job.said, f"a job that fails: {job.log}{job.said}")
    check(job.said.endswith(" with exit code 1\n"), f"a job that fails: {job.said}")
    print("a job that fails: its own sentence in the log, its exit code (1, and 2 of wrong usage)")


def serve(head: Head) -> None:
    """``dim serve`` of the released alias as a job, and one edit over HTTP."""
    port = free_port()
    began = time.monotonic()
    # After so few steps the model writes no blueprints itself.
    started = head.dim(
        ["--no-wait", "--", "serve", "--model", "models:/dim@released", "--designer", "none",
         "--port", str(port)]
    )  # fmt: skip
    _, said = started.communicate(timeout=120)
    job = re.search(r"submitted (raysubmit_\w+)", said)
    assert job is not None, said
    url, client = f"http://127.0.0.1:{port}", head.jobs()

    def ready() -> bool:
        if client.get_job_status(job[1]).is_terminal():
            raise RuntimeError(f"the server has ended: {client.get_job_logs(job[1])}")
        return _is_ready(url)

    try:
        wait_for(ready, "the server", patience_s=300)
        up = time.monotonic() - began
        began = time.monotonic()
        edited = _edit(url)
        print(
            f"`dim serve` of models:/dim@released as a job: ready after {up:.1f} s, an edit of "
            f"{edited.width} x {edited.height} over HTTP in {time.monotonic() - began:.1f} s",
            flush=True,
        )
    finally:
        client.stop_job(job[1])
        wait_for(lambda: client.get_job_status(job[1]).is_terminal(), "the server's end")


def _is_ready(url: str) -> bool:
    try:
        with urlopen(f"{url}/readyz", timeout=5) as answer:  # noqa: S310, our own server
            return bool(answer.status == 200)
    except OSError:
        return False


def _edit(url: str) -> Image.Image:
    scene = Image.new("RGB", (64, 64), (200, 180, 150))
    buffer = io.BytesIO()
    scene.save(buffer, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    asked = {"images": [{"image_url": picture}], "prompt": "Add a red cup.", "steps": 4}
    request = Request(  # noqa: S310, our own server
        f"{url}/v1/images/edits", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urlopen(request, timeout=120) as answer:  # noqa: S310
        said = json.loads(answer.read())
    return Image.open(io.BytesIO(base64.b64decode(said["data"][0]["b64_json"])))


class Store:
    """What lies in the bucket, and what MLflow has.

    Args:
        site: whose.
    """

    def __init__(self, site: Site) -> None:
        self._site = site
        self._s3 = boto3.client(
            "s3", endpoint_url=site.environment["AWS_ENDPOINT_URL"],
            aws_access_key_id=ACCESS_KEY, aws_secret_access_key=SECRET_KEY,
            region_name="us-east-1",
        )  # fmt: skip

    def objects(self, prefix: str = "") -> Iterator[dict[str, Any]]:
        """All below ``prefix``."""
        pages = self._s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        for page in pages:
            yield from page.get("Contents", ())

    def keys(self, prefix: str) -> list[str]:
        """The names below ``prefix``."""
        return [each["Key"] for each in self.objects(prefix)]

    def snapshot(self) -> set[tuple[str, str]]:
        """Each object with the time at which it was written, each run and each version."""
        from mlflow import MlflowClient

        there = {(each["Key"], str(each["LastModified"])) for each in self.objects()}
        client = MlflowClient(self._site.mlflow)
        experiments = client.search_experiments()
        runs = client.search_runs([each.experiment_id for each in experiments])
        there |= {("run", run.info.run_id) for run in runs}
        versions = client.search_model_versions()
        return there | {("version", f"{each.name} {each.version}") for each in versions}


def check(holds: bool, otherwise: str) -> None:
    """Stop where something is not as it is to be.

    Raises:
        RuntimeError: says what.
    """
    if not holds:
        raise RuntimeError(otherwise)
