"""Workflows that are really run, killed, changed and run again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import psutil
import pytest
import yaml
from mlflow import MlflowClient
from rich.console import Console

from dim.errors import ConfigError
from infra.tracking import TrackingError
from workflows import receipts as kept
from workflows.receipts import Maker, Receipt, Receipts
from workflows.run import StepError, run
from workflows.view import plan_table, status_table
from workflows.workflow import Step, Workflow, load_workflow

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
TABLETOP = {"size": 32, "kinds": ["remove"], "objects": [2, 3], "outlines": 0}


def written(folder: Path, **changes: Any) -> Path:
    edit = {"designer": "oracle", "filters": {"min_side": 16}}
    steps: dict[str, Any] = {
        "raw": {"run": "ingest", "with": {"tabletop": "${values.pairs}", **TABLETOP}},
        "other": {"run": "ingest", "with": {"tabletop_images": 5, "size": 32}},
        "edit": {
            "run": "edit",
            "file": str(CONFIGS / "data-tabletop-edit.yaml"),
            "with": {"raw": "${raw}", **edit},
        },
    } | changes
    file = folder / "workflow.yaml"
    values = {"out": str(folder / "out"), "values": {"pairs": 6}, "steps": steps}
    file.write_text(yaml.safe_dump(values))
    return file


def said_by(loaded: Workflow, **options: Any) -> str:
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        run(loaded, console, **options)
    return captured.get()


def shown(table: Any) -> str:
    console = Console(width=250)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def manifests(out: Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in out.glob("data/*/manifest.json")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> tuple[Path, str]:
    """A workflow file all of whose steps have been run, and what was said of it."""
    file = written(tmp_path_factory.mktemp("workflow"))
    return file, said_by(load_workflow(file))


def test_steps_are_run_when_what_they_take_is_there(done: tuple[Path, str]) -> None:
    file, said = done
    loaded, out = load_workflow(file), file.parent / "out"
    begun = [line.partition(":")[0] for line in said.splitlines() if ": begins" in line]
    assert begun == ["raw", "other", "edit"]
    ended = next(n for n, line in enumerate(said.splitlines()) if line.startswith("raw: 6 records"))
    assert "edit: begins" in "".join(said.splitlines()[ended:])
    assert set(manifests(out)) == {"raw", "other", "edit"}
    receipt = Receipts(loaded).read("edit")
    assert (receipt.state, receipt.result["kept"]) == ("done", 6) and receipt.seconds > 0
    assert "6 kept" in shown(status_table(loaded, Receipts(loaded), lambda name: Path("nowhere")))


def test_all_log_below_one_run(done: tuple[Path, str]) -> None:
    loaded = load_workflow(done[0])
    client = MlflowClient(str(loaded.tracking.uri))
    experiment = client.get_experiment_by_name("dim")
    runs = client.search_runs([experiment.experiment_id])
    (parent,) = [each for each in runs if each.info.run_name.startswith("workflow")]
    children = [each for each in runs if each is not parent]
    assert len(children) == 3 and parent.info.status == "FINISHED"
    assert {each.data.tags["mlflow.parentRunId"] for each in children} == {parent.info.run_id}


def test_what_is_done_is_not_done_again(done: tuple[Path, str]) -> None:
    file = done[0]
    before = {path: path.stat().st_mtime_ns for path in (file.parent / "out").rglob("*.json")}
    said = said_by(load_workflow(file))
    assert said.count("(done before)") == 3 and "begins" not in said
    after = {path: path.stat().st_mtime_ns for path in (file.parent / "out").rglob("*.json")}
    assert after == before
    plan = shown(plan_table(load_workflow(file), Receipts(load_workflow(file)), None))
    assert plan.count("is done") == 3


def test_another_setting_is_refused_until_it_is_meant(done: tuple[Path, str]) -> None:
    file = done[0]
    changed = load_workflow(file, ["pairs=7"])
    with pytest.raises(ConfigError, match=r"'raw' is done.*tabletop was 6 and is 7.*--from raw"):
        run(changed, Console(quiet=True))
    plan = shown(plan_table(changed, Receipts(changed), None))
    assert "was made otherwise: tabletop was 6 and is 7" in plan
    assert "is made again" in shown(plan_table(changed, Receipts(changed), "raw"))
    said = said_by(changed, begin_at="raw")
    assert "raw: 7 records" in said and "edit: 7 records" in said
    assert "other: 5 records: 5 kept, 0 rejected, 0 failed (done before)" in said
    # How it is done is no other setting.
    assert "begins" not in said_by(load_workflow(file, ["pairs=7", "steps.edit.with.workers=1"]))


def test_an_output_that_is_gone_is_made_again(done: tuple[Path, str]) -> None:
    file = done[0]
    loaded = load_workflow(
        file, [f"pairs={Receipts(load_workflow(file)).read('raw').result['input']}"]
    )
    other = file.parent / "out" / "data" / "other"
    before = manifests(file.parent / "out")
    shutil.rmtree(other)
    said = said_by(loaded)
    assert said.count("begins") == 1 and "other: begins" in said
    assert manifests(file.parent / "out") == before


def test_a_step_that_fails_says_why_and_where(tmp_path: Path, ray_cluster: None) -> None:
    bad = {"run": "edit", "with": {"raw": str(tmp_path / "nowhere"), "designer": "oracle"}}
    after = {"run": "ingest", "with": {"tabletop": 3, **TABLETOP}, "after": ["bad"]}
    loaded = load_workflow(written(tmp_path, raw=bad, edit=after | {"after": ["raw"]}))
    with pytest.raises(StepError) as error:
        run(loaded, Console(quiet=True))
    assert f"step 'raw': the raw pairs {tmp_path / 'nowhere'}" in str(error.value) or (
        "step 'raw': " in str(error.value) and "nowhere" in str(error.value)
    )
    log = Path(str(error.value).partition("(log: ")[2].rstrip(")"))
    assert "nowhere" in log.read_text()
    receipts = Receipts(loaded)
    assert receipts.read("raw").state == "failed" and receipts.read("edit").state == "open"
    assert receipts.read("other").state in ("open", "done")  # beside it; never left as running
    assert "failed" in shown(status_table(loaded, receipts, lambda name: Path("nowhere")))


def test_a_server_that_goes_on_is_named_when_a_run_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    page = {"run": "serve", "with": {"model": str(CONFIGS / "tiny.yaml")}}
    loaded = load_workflow(written(tmp_path, page=page))
    monkeypatch.setattr("workflows.run._Run.to_the_end", interrupt)
    console = Console(width=200)
    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server, console.capture() as said:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        done = Receipt(state="done", result={"url": url, "pid": 4711})
        Receipts(loaded).write("page", done)
        with pytest.raises(KeyboardInterrupt):
            run(loaded, console)
        server.shutdown()
    assert said.get() == f"{url}/ goes on; stop it with: kill 4711\n"
    with console.capture() as said, pytest.raises(KeyboardInterrupt):
        run(loaded, console)  # and nothing of one that has ended
    assert said.get() == ""


def test_a_server_does_not_wait_for_the_tracker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, ended = [], []

    class Process:
        def __init__(self, step: Step, program: str, **how: Any) -> None:
            begun.append(step.name)
            self.step, self.log = step, how["log"]

        def stop(self) -> None:
            ended.append(self.step.name)

    def away(*args: object) -> None:
        raise TrackingError("the tracker is away")

    monkeypatch.setattr("workflows.run.StepProcess", Process)
    monkeypatch.setattr("workflows.run.prepare", list)
    monkeypatch.setattr("workflows.run.Tracking.run", away)
    page = {"run": "serve", "with": {"model": str(CONFIGS / "tiny.yaml")}}
    loaded = load_workflow(written(tmp_path, page=page))
    with pytest.raises(TrackingError):
        run(loaded, Console(quiet=True))
    assert begun == ended == ["page"]  # people wait for it, and it logs to no run
    assert Receipts(loaded).read("page").state == "open"


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    loaded = load_workflow(written(tmp_path))
    here = kept.maker()
    Receipts(loaded).write("raw", Receipt(state="running", maker=here))
    with pytest.raises(StepError, match=f"'raw' is being made by process {os.getpid()} on"):
        run(loaded, Console(quiet=True))
    elsewhere = {"pid": 1, "host": "elsewhere"}
    assert Maker(**elsewhere, beat=time.time()).alive
    assert not Maker(**elsewhere, beat=time.time() - 3600).alive
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not here.model_copy(update={"pid": ended.pid}).alive
    assert not here.model_copy(update={"process": f"{here.process}1"}).alive  # its number is ours
    said = shown(status_table(loaded, Receipts(loaded), lambda name: Path("nowhere")))
    assert "runs" in said
    with pytest.raises(ConfigError, match="--from edt: no such step"):
        Receipts(loaded).write("raw", Receipt())
        run(loaded, Console(quiet=True), begin_at="edt")


@pytest.fixture
def command(ray_cluster: None) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Starts ``dim run`` on the tests' own Ray; what is left of it ends with the test."""
    import ray

    address = ray.get_runtime_context().gcs_address
    begun: list[subprocess.Popen[str]] = []

    def start(file: Path) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "workflows.run", str(file)],
            cwd=ROOT, env=os.environ | {"RAY_ADDRESS": address}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        begun.append(process)
        return process

    yield start
    for process in begun:
        process.kill()
        process.wait()


def wait_for(happened: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_killed_anywhere_it_goes_on(
    tmp_path: Path, command: Callable[[Path], subprocess.Popen[str]]
) -> None:
    file, receipts = written(tmp_path), Receipts(load_workflow(written(tmp_path)))

    def makes_edit(process: subprocess.Popen[str]) -> bool:
        maker = receipts.read("edit").maker
        return process.poll() is not None or (maker is not None and maker.pid == process.pid)

    for how, code in ((signal.SIGTERM, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = command(file)
        wait_for(partial(makes_edit, process))
        steps = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(how)
        assert process.wait(90) == code, process.stdout and process.stdout.read()
        # Nothing of it stays behind.
        assert not psutil.wait_procs(steps, timeout=60)[1]
        assert receipts.read("edit").state == ("open" if how == signal.SIGTERM else "running")
    again = command(file)
    said, _ = again.communicate(timeout=180)
    assert again.returncode == 0, said
    assert "raw: 6 records: 6 kept, 0 rejected, 0 failed (done before)" in said
    assert "edit: 6 records: 6 kept" in said
