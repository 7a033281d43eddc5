from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dim.errors import DimError, InputError
from infra.submit import connect, entrypoint_of, submit

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
    done = submit_from_outside(
        tmp_path, "edit", "missing.png", "remove the cup", "--model", "nowhere"
    )
    assert done.returncode == 1
    assert "submitted raysubmit_" in done.stderr
    assert "error: image not found: missing.png" in done.stdout
    assert done.stderr.splitlines()[-1].startswith("error: job raysubmit_")
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
