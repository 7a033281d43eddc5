"""A site on this machine: a guarded head of Ray, an object store, an MLflow server."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import psutil

from infra.ports import free_port
from infra.submit import connect
from tests import rclone_server

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = Path(sys.executable).parent
BUCKET = "dim"
PATIENCE_S = 180.0
_OF_OTHERS = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


@dataclass(frozen=True)
class Site:
    """Where jobs run, and what they are told.

    Attributes:
        folder: for all that is not in the store; it is the home folder of all programs here.
        environment: of whoever starts a program here.
        mlflow: address of the MLflow server.
    """

    folder: Path
    environment: Mapping[str, str]
    mlflow: str

    @property
    def store(self) -> str:
        """Address of the bucket."""
        return f"s3://{BUCKET}"


@dataclass(frozen=True)
class Head:
    """A head of Ray.

    Attributes:
        site: where it is.
        dashboard: address of its job server.
        gcs: ``HOST:PORT`` of its control.
        process: ``ray start --block``.
        log: what it says.
    """

    site: Site
    dashboard: str
    gcs: str
    process: subprocess.Popen[bytes]
    log: Path

    def submit(self, *command: str, **others: Any) -> subprocess.Popen[str]:
        """``dim submit`` of a sub-command with this checkout as the working directory."""
        return self.dim(["--", *command], **others)

    def dim(self, arguments: Sequence[str], **others: Any) -> subprocess.Popen[str]:
        """``dim submit`` with any arguments; its two outputs are pipes unless told otherwise."""
        told = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | others
        return subprocess.Popen(
            [sys.executable, "-m", "infra.submit", "--address", self.dashboard,
             "--working-dir", str(ROOT), *arguments],
            env=dict(self.site.environment), cwd=ROOT, **told,
        )  # fmt: skip

    def jobs(self) -> Any:
        """A client of the job server."""
        return connect(self.dashboard)


@contextmanager
def home(folder: Path | None) -> Iterator[Path]:
    """A home folder that goes in the end; the one that is named stays, for another call to go on.

    Its name is to be short: Ray's sockets lie below it.
    """
    if folder is not None:
        folder.mkdir(exist_ok=True)
        yield folder.resolve()
        return
    made = Path(tempfile.mkdtemp(prefix="dim"))
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


@contextmanager
def site(folder: Path, *, host: str = "127.0.0.1") -> Iterator[Site]:
    """A token, rclone's S3 server with a bucket, MLflow over SQLite and that bucket.

    Args:
        folder: where all of it is kept.
        host: where the servers listen.
    """
    environment = {name: text for name, text in os.environ.items() if name not in _OF_OTHERS}
    token = folder / ".ray" / "auth_token"
    token.parent.mkdir(exist_ok=True)
    if not token.exists():
        token.write_text(secrets.token_hex(32))
    (folder / "buckets" / BUCKET).mkdir(parents=True, exist_ok=True)
    with rclone_server.running(folder / "buckets", host=host) as url:
        environment |= rclone_server.environment(url) | {
            "HOME": str(folder),
            "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
            "DIM_CACHE": str(folder / "models"),
        }
        with _mlflow(folder, environment, host) as mlflow:
            environment["MLFLOW_TRACKING_URI"] = mlflow
            # Also for this process, which looks at the cluster itself.
            os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
            yield Site(folder, environment, mlflow)


@contextmanager
def _mlflow(folder: Path, environment: Mapping[str, str], host: str) -> Iterator[str]:
    port = free_port(host)
    with (folder / "mlflow.log").open("wb") as log:
        server = subprocess.Popen(
            [SCRIPTS / "mlflow", "server", "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
             "--artifacts-destination", f"s3://{BUCKET}/mlflow", "--host", host,
             "--port", str(port), "--workers", "1"],
            env=dict(environment), cwd=folder, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    url = f"http://{host}:{port}"
    try:
        wait_for(lambda: answers(f"{url}/health"), "the MLflow server", server)
        yield url
    finally:
        end(server)


@contextmanager
def head(
    place: Site,
    *options: str,
    host: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    gcs_port: int | None = None,
    block: bool = True,
) -> Iterator[Head]:
    """``ray start --head`` with the job server, guarded by the token in the home folder.

    Args:
        place: where it belongs.
        options: of ``ray start``, besides.
        host: its address.
        prefix: before its command, such as ``ip netns exec NAME``.
        variables: of its environment, besides.
        gcs_port: of its control; a free one unless given.
        block: one process watches all of it, and ends it when a part of it ends.
    """
    port, gcs = free_port(host) if not prefix else 8265, gcs_port or free_port()
    log = place.folder / f"head-{gcs}.log"
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*prefix, SCRIPTS / "ray", "start", "--head", *(["--block"] if block else []),
             "--temp-dir",
             place.folder / "ray", "--node-ip-address", host, "--port", str(gcs),
             "--dashboard-host", host, "--dashboard-port", str(port), "--disable-usage-stats",
             "--ray-client-server-port", str(free_port()),
             "--dashboard-agent-listen-port", str(free_port()),
             "--dashboard-agent-grpc-port", str(free_port()),
             "--object-store-memory", str(300 * 2**20), *options],
            env={**place.environment, **(variables or {})}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    started = Head(place, f"http://{host}:{port}", f"{host}:{gcs}", process, log)
    try:
        watched = process if block else None
        wait_for(lambda: answers(f"{started.dashboard}/api/version"), "Ray's head", watched)
        yield started
    finally:
        end(process)
        _end_all_of(place.folder)


def answers(url: str) -> bool:
    """Whether a server is there, be it that it wants a token."""
    try:
        urlopen(url, timeout=5).close()  # noqa: S310, our own server
    except HTTPError as refused:
        return refused.code in (401, 403)
    except OSError:
        return False
    return True


def wait_for(
    there: Callable[[], bool],
    what: str,
    process: subprocess.Popen[Any] | None = None,
    patience_s: float = PATIENCE_S,
) -> float:
    """Wait for a thing itself; the seconds that it took.

    Raises:
        RuntimeError: its process has ended, or it took too long.
    """
    began = time.monotonic()
    while not there():
        if process is not None and process.poll() is not None:
            raise RuntimeError(f"{what} has ended, exit status {process.returncode}")
        if time.monotonic() - began > patience_s:
            raise RuntimeError(f"{what}: not within {patience_s:.0f} s")
        time.sleep(0.1)
    return time.monotonic() - began


def told(values: Any) -> str:
    """A value for the command line of a job."""
    return json.dumps(values)


def _end_all_of(home: Path) -> None:
    """End what of Ray has this home folder, and so was started here."""
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("HOME") == str(home) and "/ray/" in " ".join(
                process.cmdline()
            ):
                process.kill()


def end(process: subprocess.Popen[Any]) -> None:
    """End a process with all that it has started: it leads a session of its own.

    It is not waited for long: a node of Ray would drain itself for half a minute.
    """
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
