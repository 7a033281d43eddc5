"""``dim doctor`` against things that are broken, one kind at a time."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import boto3
import pytest

from dim import cli
from infra.diagnosis import machine, nodes
from infra.diagnosis.bucket import examine_store
from infra.diagnosis.finding import Finding, Status
from infra.diagnosis.machine import FULL, examine_machine, examine_ports
from infra.diagnosis.nodes import Wanted, compare
from infra.diagnosis.tracker import examine_tracker
from infra.ports import free_port


def by_check(findings: Iterator[Finding]) -> dict[str, Finding]:
    found = {finding.check: finding for finding in findings}
    for finding in found.values():
        assert "\n" not in finding.said + finding.advice
        assert bool(finding.advice) or finding.status in (Status.OK, Status.SKIPPED)
    return found


def states(findings: dict[str, Finding]) -> dict[str, str]:
    return {name: finding.status.value for name, finding in findings.items()}


def test_a_bucket_that_works(rclone_s3: str) -> None:
    found = by_check(examine_store(rclone_s3))
    assert set(states(found).values()) == {"ok"}
    assert list(found) == [
        "credentials", "clock", "bucket: write", "bucket: read", "bucket: list", "bucket: delete",
    ]  # fmt: skip
    assert found["credentials"].said == "found (env)"
    session = boto3.session.Session()  # the default one keeps the keys of another test
    left = session.client("s3", endpoint_url=os.environ["AWS_ENDPOINT_URL"]).list_objects_v2(
        Bucket=rclone_s3.removeprefix("s3://").split("/")[0]
    )
    assert not [key for key in left.get("Contents", []) if "dim-doctor" in key["Key"]]


def test_a_key_that_the_store_does_not_know(
    rclone_s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    found = by_check(examine_store(rclone_s3))
    assert found["bucket: write"].status is Status.FAILED
    assert "allowed s3:PutObject" in found["bucket: write"].advice
    assert states(found)["bucket: read"] == states(found)["bucket: delete"] == "skipped"
    assert "not-the-secret" not in str(found)


def test_a_bucket_that_is_not_there(s3: str) -> None:
    found = by_check(examine_store("s3://no-such-bucket-here/a"))
    assert found["bucket: write"].status is Status.FAILED
    assert "the bucket does not exist" in found["bucket: write"].said


def test_no_credentials(rclone_s3: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    found = by_check(examine_store(rclone_s3))
    assert found["credentials"].status is Status.FAILED
    assert "AWS_ACCESS_KEY_ID" in found["credentials"].advice
    assert found["bucket: write"].status is Status.FAILED


def test_a_profile_that_is_not_there(rclone_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    credentials = next(iter(examine_store(rclone_s3)))
    assert credentials.status is Status.FAILED and "nobody" in credentials.said


def test_a_store_that_does_not_answer(rclone_s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{free_port()}")
    began = time.monotonic()
    found = by_check(examine_store(rclone_s3))
    assert time.monotonic() - began < 15  # and not the minute for which a job would go on asking
    assert found["clock"].status is Status.FAILED and "cannot be reached" in found["clock"].said
    assert states(found)["bucket"] == "skipped"


def test_an_address_that_is_none() -> None:
    (finding,) = by_check(examine_store("gs://bucket")).values()
    assert finding.status is Status.FAILED and "cannot store at gs://bucket" in finding.said


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = by_check(examine_store(str(tmp_path / "file")))
    assert found["bucket: write"].status is Status.FAILED
    assert "who owns the folder" in found["bucket: write"].advice


@pytest.fixture
def clock_of(rclone_s3: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """A store that answers with a clock of its own, ``ahead`` seconds ahead of ours."""
    state = SimpleNamespace(ahead=0.0)

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(403)
            if state.ahead is not None:
                self.send_header("Date", formatdate(time.time() + state.ahead, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_PUT = do_HEAD = do_POST = do_DELETE = do_GET

        def log_message(self, *_: object) -> None:
            """Quietly."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_address[1]}")
    yield state
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("ahead", "status", "said"),
    [
        (0.0, Status.OK, "store's"),
        (100.0, Status.WARNING, "behind the store's; signed requests are refused"),
        (1200.0, Status.FAILED, "s behind the store's"),
        (-1200.0, Status.FAILED, "s ahead of the store's"),
        (None, Status.WARNING, "does not say what time it is"),
    ],
)
def test_a_clock_that_is_wrong(
    clock_of: SimpleNamespace, ahead: float | None, status: Status, said: str
) -> None:
    clock_of.ahead = ahead
    findings = examine_store("s3://bucket/folder")
    next(findings)
    clock = next(findings)
    assert (clock.check, clock.status) == ("clock", status)
    assert said in clock.said


def test_a_tracker_that_works_and_one_that_is_to_come(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    to_come = examine_tracker(uri)
    assert to_come.status is Status.OK and "made by the first run" in to_come.said
    assert not list(tmp_path.iterdir())
    from infra.tracking import Tracking

    Tracking(uri, "any")
    assert examine_tracker(uri) == Finding("tracking", Status.OK, uri)


def test_a_tracker_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    uri = f"http://127.0.0.1:{free_port()}"
    finding = examine_tracker(uri)
    assert finding.status is Status.FAILED and uri in finding.said
    assert "MLFLOW_TRACKING_URI" in finding.advice


def test_a_tracker_whose_database_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("no database")
    finding = examine_tracker(f"sqlite:///{tmp_path / 'mlflow.db'}")
    assert finding.status is Status.FAILED


SMI = """
Driver Version                            : {driver}
CUDA Version                              : {cuda}
Attached GPUs                             : 2
GPU 00000000:19:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
GPU 00000000:3B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in for `nvidia-smi`, the first of its name on the path."""
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\ncat <<'EOF'\n" + SMI.format(driver="580.95", cuda="13.0") + "EOF\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return program


def gpu(monkeypatch: pytest.MonkeyPatch, built: str | None) -> Finding:
    import torch

    monkeypatch.setattr(torch.version, "cuda", built)
    return by_check(examine_machine())["gpu"]


def test_gpus_whose_driver_serves_torch(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = gpu(monkeypatch, "13.0")
    assert finding.status is Status.OK
    assert finding.said.startswith("2 x NVIDIA H100 80GB HBM3, driver 580.95; torch ")


def test_gpus_without_a_torch_for_them(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = gpu(monkeypatch, None)
    assert finding.status is Status.FAILED and "its build for CPUs" in finding.said
    assert "target `cuda`" in finding.advice


def test_a_driver_that_is_too_old(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text(smi.read_text().replace("580.95", "535.10").replace("13.0", "12.2"))
    finding = gpu(monkeypatch, "13.0")
    assert finding.status is Status.FAILED
    assert "driver 535.10, which serves CUDA 12; torch wants 13.0" in finding.said


def test_a_driver_that_is_broken(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed: no driver'; exit 9\n")
    finding = gpu(monkeypatch, "13.0")
    assert finding.status is Status.FAILED
    assert "nvidia-smi fails: NVIDIA-SMI has failed: no driver" in finding.said


def test_a_driver_that_hangs(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(machine, "_SMI_PATIENCE_S", 0.2)
    finding = gpu(monkeypatch, "13.0")
    assert finding.status is Status.FAILED and "TimeoutExpired" in finding.said


def test_a_container_that_was_given_no_gpu(smi: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi.write_text("#!/bin/sh\necho 'Driver Version : 580.95'\n")
    finding = gpu(monkeypatch, "13.0")
    assert finding.status is Status.WARNING and finding.advice == "a container wants `--gpus all`"


def test_no_gpu_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu(monkeypatch, None).status is Status.OK


@pytest.mark.parametrize(
    ("used", "status"),
    [(0.5, Status.OK), (0.9, Status.WARNING), (FULL + 0.01, Status.FAILED), (1.0, Status.FAILED)],
)
def test_a_disk_that_is_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, used: float, status: Status
) -> None:
    usage = SimpleNamespace(total=100e9, used=used * 100e9, free=(1 - used) * 100e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    finding = by_check(examine_machine([str(tmp_path)]))[f"disk of {tmp_path}"]
    assert finding.status is status
    assert f"{(1 - used) * 100:.1f} GB of 100.0 GB are free" in finding.said
    assert status is Status.OK or "RAY_TMPDIR" in finding.advice


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    missing = str(tmp_path / "none")
    finding = by_check(examine_machine([missing]))[f"disk of {missing}"]
    assert finding.status is Status.FAILED and finding.advice == "make the folder"


def test_shared_memory_as_docker_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = SimpleNamespace(total=64 << 20, used=0, free=64 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    finding = by_check(examine_machine())["shared memory"]
    assert finding.status is Status.WARNING and finding.said.startswith("0.1 GB in /dev/shm, Ray")
    assert "--shm-size=" in finding.advice


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken, free = server.getsockname()[1], free_port()
        found = by_check(examine_ports([taken, free]))
    assert states(found) == {f"port {taken}": "warning", f"port {free}": "ok"}
    assert f"sport = {taken}" in found[f"port {taken}"].advice


def test_nodes_of_different_versions_are_named() -> None:
    usual = {"python": "3.11.7", "torch": "2.13.0"}
    answers = {f"10.0.0.{n}": dict(usual) for n in range(6)}
    same = compare(answers)
    assert same == Finding("versions", Status.OK, "the same on all 6 nodes")
    for n in range(4):
        answers[f"10.0.1.{n}"] = {**usual, "torch": "2.12.1"}
    finding = compare(answers)
    assert finding.status is Status.FAILED
    assert finding.said == (
        "torch is 2.13.0 on most, 2.12.1 on 10.0.1.0, 10.0.1.1, 10.0.1.2 and 1 more"
    )
    assert "one image" in finding.advice


def test_the_exit_code_and_the_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("RAY_ADDRESS", "DIM_STORE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    free = f"--port={free_port()}"
    assert cli.execute(cli.root(), ["doctor", "--store", str(tmp_path), free], prog_name="dim") == 0
    said = capsys.readouterr().out.splitlines()
    assert f"ok       bucket: write: {tmp_path}" in said
    assert "skipped  tracking: no server named" in said
    assert "0 failed" not in said[-1] and "1 skipped" in said[-1]

    broken = ["doctor", "--store", "gs://x", "--json", free]
    assert cli.execute(cli.root(), broken, prog_name="dim") == 1
    told = {found["check"]: found for found in json.loads(capsys.readouterr().out)}
    assert told["bucket"]["status"] == "failed"
    assert set(told["bucket"]) == {"check", "status", "said", "advice", "node"}


def test_a_port_is_not_asked_of_a_cluster(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert cli.execute(cli.root(), ["doctor", "--port", "8000"], prog_name="dim") == 1
    assert "--port is of this machine alone" in capsys.readouterr().err


def test_credentials_in_addresses_are_not_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    uri = f"http://me:hush-hush@127.0.0.1:{free_port()}"
    arguments = ["doctor", "--tracking", uri, f"--port={free_port()}"]
    assert cli.execute(cli.root(), arguments, prog_name="dim") == 1
    assert "hush-hush" not in capsys.readouterr().out


def test_a_cluster_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    def refused(*_: object, **__: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nMore.")

    monkeypatch.setattr(ray, "init", refused)
    (finding,) = nodes.examine_cluster("10.0.0.1:6379", Wanted(None, None))
    assert finding.status is Status.FAILED
    assert finding.said == (
        "10.0.0.1:6379 cannot be joined: Could not find any running Ray instance."
    )
