"""Passwords in addresses: needed to get there, and found nowhere afterwards.

The commands run in processes of their own with a Ray of their own, so that all they print and log
can be searched.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest

from dim.blueprint import Blueprint
from infra.ports import free_port
from tests import image_server
from tests.chat_server import ChatServer, Response, completion, running, text_of
from tests.pipelines.samples import encoded, photo, write_pairs

ROOT = Path(__file__).resolve().parents[2]
PLAN = Blueprint("Add a red box.", "A field.", "- grass", "The left.", "A field with a box.")
SECRET = "s3cret"


@pytest.fixture(scope="module")
def mlflow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of an MLflow server, and the folder where all it knows lies."""
    folder, port = tmp_path_factory.mktemp("mlflow"), free_port()
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port),
             "--backend-store-uri", f"sqlite:///{folder}/mlflow.db",
             "--artifacts-destination", str(folder / "files"), "--workers", "1"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 90
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline, "it did not start"
                time.sleep(0.2)
        yield f"127.0.0.1:{port}", folder
    finally:
        os.killpg(server.pid, 15)
        server.wait()


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    with running(lambda request: completion("a plan")) as server:
        yield server


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Where Ray keeps its logs: a short name, because sockets lie there too."""
    with tempfile.TemporaryDirectory(prefix="dim") as folder:
        yield Path(folder)


def files_with_the_secret(*folders: Path) -> list[str]:
    found = []
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file() and SECRET.encode() in path.read_bytes():
                found.append(str(path))
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)  # a dozen commands, of which four start a Ray
def test_a_password_is_found_in_nothing_that_a_job_leaves(
    mlflow_server: tuple[str, Path], chat_server: ChatServer, ray_folder: Path, tmp_path: Path
) -> None:
    host, tracked = mlflow_server
    environment = {
        **os.environ,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
        "MLFLOW_TRACKING_URI": f"http://me:{SECRET}@{host}",
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(ray_folder),
    }

    def run(*command: str, fails: bool = False) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "dim.cli", "--debug", *command],
            env=environment, capture_output=True, text=True, timeout=200, cwd=ROOT,
        )  # fmt: skip
        said = done.stdout + done.stderr
        assert bool(done.returncode) == fails, said
        assert SECRET not in said
        return said

    def respond(request: dict[str, Any]) -> Response:
        if "number 2." in text_of(request):
            return Response(f"no such model at http://me:{SECRET}@host/".encode(), 400)
        return completion(f"Alignment: aligned\n\n{PLAN.render()}")

    chat_server.respond = respond
    outputs = tmp_path / "outputs"
    pairs = write_pairs(tmp_path / "pairs", 4)
    run("data", "ingest", "--pairs", str(pairs), "--out", str(outputs / "raw"))

    designer = chat_server.url.replace("://", f"://me:{SECRET}@")
    edit = ["data", "edit", "--raw", str(outputs / "raw"), "--out", str(outputs / "edit"),
            "filters.min_side=32", "calls.retries=0"]  # fmt: skip
    said = run(*edit, "--designer", f"openai:m@{designer}?api_key={SECRET}")
    assert "core_worker" not in said  # Ray's warning at every pool of actors
    asked = len(chat_server.requests)
    assert asked >= 4 and all(SECRET in request["path"] for request in chat_server.requests)
    manifest = json.loads((outputs / "edit" / "manifest.json").read_text())
    shown = chat_server.url.replace("://", "://***@")
    assert manifest["config"]["designer"] == f"openai:m@{shown}?api_key=***"
    assert (manifest["counts"]["kept"], manifest["counts"]["failed"]) == (3, 1)
    # Another password is no other output.
    run(*edit, "--designer", f"openai:m@{designer}?api_key=another-{SECRET}")
    assert len(chat_server.requests) == asked

    with image_server.serving() as images:
        signed = f"/%s.png?X-Amz-Credential={SECRET}&X-Amz-Signature={SECRET}"
        images.answers[signed % "good"] = image_server.ok(encoded(photo(1)))
        images.answers[signed % "bad"] = image_server.status(418)
        lines = [json.dumps({"image": images.url + signed % name}) for name in ("good", "bad")]
        (tmp_path / "urls.jsonl").write_text("\n".join(lines))
        run("data", "ingest", "--images", str(tmp_path / "urls.jsonl"), "--fetch",
            "--out", str(outputs / "fetched"), "fetch.allow_private=true")  # fmt: skip
    counts = json.loads((outputs / "fetched" / "manifest.json").read_text())["counts"]
    assert (counts["kept"], counts["failed"]) == (1, 1)

    run("data", "inspect", str(outputs / "edit"), "--page", str(outputs / "page.html"))
    run("data", "export", "--data", str(outputs / "edit"), "--out", str(outputs / "exported"))

    run(*edit, "--out", str(outputs / "down"), "--designer",
        f"openai:m@http://me:{SECRET}@127.0.0.1:1/v1", fails=True)  # fmt: skip
    errors = pq.read_table(outputs / "down" / "failed")["error"].to_pylist()
    assert len(errors) == 4 and all("m at http://***@127.0.0.1:1/v1: " in text for text in errors)
    wrong = f"s3://KEY:{SECRET}@bucket/raw"
    assert "s3://***@bucket/raw" in run(
        "data", "ingest", "--tabletop", "2", "--out", wrong, fails=True
    )
    wrong = f"tracking.uri=http://me:{SECRET}@127.0.0.1:1"
    said = run("data", "ingest", "--tabletop", "2", "--out", str(outputs / "x"), wrong, fails=True)
    assert "MLflow at http://***@127.0.0.1:1 cannot" in said
    run("data", "edit", f"http://me:{SECRET}@host", f"x=https://h/?key={SECRET}", fails=True)

    assert (tracked / "mlflow.db").stat().st_size > 0 and list((tracked / "files").rglob("*.json"))
    assert files_with_the_secret(outputs, tracked, ray_folder) == []
