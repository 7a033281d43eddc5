from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from dim import cli
from dim.errors import DimError, InputError
from infra import submit as submit_module
from infra.ports import free_port
from infra.submit import connect, entrypoint_of, follow, submit

# A cluster of its own in its own process: the test session's Ray has no job server. Both run an
# agent, whose port Ray fixes unless told, and without an agent a cluster takes no job.
SUBMITTER = """
import sys
from ray.cluster_utils import Cluster
from infra.ports import free_port
from infra.submit import main
from dim.cli import run

head = dict(num_cpus=2, include_dashboard=True, dashboard_port=free_port(),
            dashboard_agent_listen_port=free_port())
cluster = Cluster(initialize_head=True, head_node_args=head)
try:
    run(main, ["--address", "http://" + cluster.head_node.webui_url, "--working-dir", sys.argv[1],
               "--", *sys.argv[2:]])
finally:
    cluster.shutdown()
"""


def submit_from_outside(working_dir: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        # The job is started as `python`, which must be this one.
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    environment.pop("RAY_ADDRESS", None)
    return subprocess.run(
        [sys.executable, "-c", SUBMITTER, str(working_dir), *command],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def test_the_entrypoint_is_the_program_of_the_sub_command() -> None:
    assert entrypoint_of(["train", "configs/a.yaml", "steps=20"]) == (
        "python -m training.train configs/a.yaml steps=20"
    )
    assert entrypoint_of(["data", "edit", "--raw", "s3://b/a b"]) == (
        "python -m pipelines.edit --raw 's3://b/a b'"
    )


@pytest.mark.parametrize("command", [["trian"], ["data"], ["submit", "train"], ["data", "eat"]])
def test_what_is_no_job_is_refused(command: list[str]) -> None:
    with pytest.raises(InputError, match="cannot submit .*sub-commands are: .*train"):
        entrypoint_of(command)


def test_no_cluster_is_one_sentence() -> None:
    with pytest.raises(DimError, match=r"no Ray cluster answers at http://127\.0\.0\.1:1"):
        connect("http://127.0.0.1:1")


def test_a_job_runs_on_a_cluster_and_its_failure_is_ours(tmp_path: Path) -> None:
    done = submit_from_outside(tmp_path, "doctor", "--nonsense")
    assert done.returncode == 2  # of the job's program: wrong usage
    assert "submitted raysubmit_" in done.stderr
    assert "error: No such option: --nonsense" in done.stdout
    assert done.stderr.endswith(" failed: Job entrypoint command failed with exit code 2\n")
    assert "Traceback" not in done.stderr


class ClusterThatJustCameUp:
    """The job server's answers while its agents are still starting."""

    def __init__(self, failures: list[str]) -> None:
        self.failures = failures

    def submit_job(self, **_: object) -> str:
        if self.failures:
            raise RuntimeError(self.failures.pop(0))
        return "raysubmit_1"


def test_a_cluster_that_just_came_up_is_waited_for(tmp_path: Path) -> None:
    starting = ClusterThatJustCameUp(["500: No available agent to submit job, try again"])
    assert submit(starting, "python -m training.train", tmp_path) == "raysubmit_1"
    refusing = ClusterThatJustCameUp(["status code 400:\n no such thing"])
    with pytest.raises(DimError, match="not taken: status code 400: no such thing"):
        submit(refusing, "python -m training.train", tmp_path)


class JobThatEnds:
    """A job's log and what became of it; ``stopped`` is whether anybody asked to end it."""

    def __init__(self, status: str, exit_code: int | None, interrupted: bool = False) -> None:
        self.info = SimpleNamespace(
            status=status,
            driver_exit_code=exit_code,
            message="Job entrypoint\nfailed, last available logs (truncated to 20,000 chars):\nit",
        )
        self.interrupted, self.stopped = interrupted, False

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        yield f"{job} says so\n"
        if self.interrupted:
            raise KeyboardInterrupt

    def get_job_info(self, job: str) -> SimpleNamespace:
        return self.info

    def stop_job(self, job: str) -> None:
        self.stopped = True


@pytest.mark.parametrize(
    ("status", "code", "wanted"),
    [("FAILED", 2, 2), ("FAILED", 130, 130), ("FAILED", None, 1), ("STOPPED", None, 1)],
)
def test_a_job_s_exit_code_is_ours(
    status: str, code: int | None, wanted: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def command() -> None:
        follow(JobThatEnds(status, code), "raysubmit_1")

    assert cli.execute(cli.command_of(command), [], prog_name="dim submit") == wanted
    told = capsys.readouterr()
    assert told.out == "raysubmit_1 says so\n"
    assert told.err == f"error: job raysubmit_1 {status.lower()}: Job entrypoint failed\n"


def test_a_job_that_succeeds_is_followed_to_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    follow(JobThatEnds("SUCCEEDED", 0), "raysubmit_1")
    assert capsys.readouterr() == ("raysubmit_1 says so\n", "")


def test_ctrl_c_leaves_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    job = JobThatEnds("RUNNING", None, interrupted=True)

    def command() -> None:
        follow(job, "raysubmit_1")

    assert cli.execute(cli.command_of(command), [], prog_name="dim submit") == 130
    assert not job.stopped
    told = capsys.readouterr().err
    assert "raysubmit_1 goes on; `dim submit --attach raysubmit_1` follows it again" in told


def test_a_lost_connection_is_made_again_and_no_line_comes_twice(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class LosesTheAgent(JobThatEnds):
        connections = 0

        async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
            self.connections += 1
            yield "one\ntwo\n"
            if self.connections == 1:
                return  # as Ray's head ends it when the driver's node is gone
            yield "three\n"
            if self.connections == 2:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            self.info.status = "SUCCEEDED"
            yield "four\n"

    monkeypatch.setattr(submit_module, "_AGAIN_S", 0)
    job = LosesTheAgent("RUNNING", None)
    follow(job, "raysubmit_1")
    assert capsys.readouterr().out == "one\ntwo\nthree\nfour\n"
    assert job.connections == 3


def test_a_job_that_nobody_knows_is_one_sentence() -> None:
    class Forgotten(JobThatEnds):
        def get_job_info(self, job: str) -> SimpleNamespace:
            raise RuntimeError("Request failed with status code 404: Job does not exist.")

    with pytest.raises(DimError, match="the cluster knows no job raysubmit_1"):
        follow(Forgotten("RUNNING", None), "raysubmit_1")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        ([], "either a command to submit, or --attach"),
        (["--attach", "raysubmit_1", "--", "train", "a.yaml"], "either a command to submit, or"),
        (["--attach", "raysubmit_1", "--no-wait"], "leave one of them out"),
    ],
)
def test_what_to_follow_is_said_once(
    arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.execute(cli.command_of(submit_module.main), arguments, prog_name="dim submit") == 1
    assert wanted in capsys.readouterr().err


TOKEN = "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def guarded_head() -> Iterator[tuple[str, Path]]:
    """A head of ``ray start`` in a home folder where a token lies, so that it asks for it.

    Gives the address of its dashboard and the home folder, whose name is short because Ray's
    sockets lie below it.
    """
    home, port = Path(tempfile.mkdtemp(prefix="dim")), free_port()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    scripts = Path(sys.executable).parent
    environment |= {"HOME": str(home), "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    with (home / "log").open("wb") as log:
        head = subprocess.Popen(
            [scripts / "ray", "start", "--head", "--block", "--num-cpus", "2",
             "--temp-dir", home / "ray", "--port", str(free_port()), "--dashboard-port", str(port),
             "--ray-client-server-port", str(free_port()), "--disable-usage-stats",
             "--dashboard-agent-listen-port", str(free_port()),
             "--dashboard-agent-grpc-port", str(free_port())],
            env=environment, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_until_it_asks(head, port, home / "log")
        yield f"http://127.0.0.1:{port}", home
    finally:
        head.send_signal(signal.SIGTERM)  # it ends all that it has started
        head.wait(60)
        shutil.rmtree(home)


def wait_until_it_asks(head: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urlopen(f"http://127.0.0.1:{port}/api/version", timeout=5).close()
            pytest.fail("the head lets everybody in")
        except HTTPError as refused:
            assert refused.code == 401
            return
        except OSError:
            assert head.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder and an environment without a token."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_a_token_is_found_wherever_ray_keeps_it(
    guarded_head: tuple[str, Path], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, home = guarded_head
    monkeypatch.setenv("HOME", str(home))
    assert connect(address).list_jobs() == []
    monkeypatch.setenv("HOME", str(nowhere))
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(home / ".ray" / "auth_token"))
    assert connect(address).list_jobs() == []
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(nowhere / "none"))
    monkeypatch.setenv("RAY_AUTH_TOKEN", f"{TOKEN}\n")
    assert connect(address).list_jobs() == []


def test_without_the_token_all_that_is_needed_is_said(
    guarded_head: tuple[str, Path], nowhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, _ = guarded_head
    with pytest.raises(DimError, match="wants its token, and there is none here") as wanting:
        connect(address)
    for needed in ("RAY_AUTH_TOKEN,", "RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token", "get-auth-token"):
        assert needed in str(wanting.value)
    assert "`ray job submit` needs RAY_AUTH_MODE=token besides" in str(wanting.value)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "another")
    with pytest.raises(DimError, match="has another token than the one in RAY_AUTH_TOKEN: take th"):
        connect(address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(nowhere / "none"))
    with pytest.raises(DimError, match="RAY_AUTH_TOKEN_PATH: there is no file .*/none"):
        connect(address)
    (nowhere / "none").write_text(" \n")
    with pytest.raises(DimError, match="none is to hold the token of the cluster and is empty"):
        connect(address)


def test_a_job_is_submitted_and_followed_where_a_token_is_asked_for(
    guarded_head: tuple[str, Path], nowhere: Path
) -> None:
    address, home = guarded_head
    (nowhere / "work").mkdir()

    def dim_submit(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "infra.submit", "--address", address, "--working-dir",
             str(nowhere / "work"), *arguments],
            env={**os.environ, "HOME": str(home)}, capture_output=True, text=True, timeout=250,
        )  # fmt: skip

    done = dim_submit("--", "edit", "missing.png", "remove the cup", "--model", "nowhere")
    assert done.returncode == 1
    job = re.search(r"submitted (raysubmit_\w+)", done.stderr)
    assert job is not None
    assert "error: image not found: missing.png" in done.stdout, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    again = dim_submit("--attach", job[1])
    assert (again.returncode, again.stdout) == (1, done.stdout)
    assert again.stderr.splitlines()[-1] == done.stderr.splitlines()[-1]
