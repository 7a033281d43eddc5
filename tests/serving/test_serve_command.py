from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from dim import cli
from dim.errors import DimError
from infra.ports import free_port
from serving.serve import address_to_show, check_port


def run(*arguments: str | Path) -> int:
    return cli.execute(cli.root(), ["serve", *(str(item) for item in arguments)], prog_name="dim")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def test_a_port_in_use_is_one_line(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert run("--model", tiny_model_dir, "--port", str(port)) == 1
    assert f"cannot listen on port {port}" in error_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--model", "nowhere"], 1, "no model at nowhere"),
        (["--model", "MODEL", "--designer", "gtp4"], 1, "unknown designer 'gtp4'"),
        (["--model", "MODEL", "--designer", "replay:gone.jsonl"], 1, "gone.jsonl"),
        (["--model", "MODEL", "--port", "99999"], 2, "port"),
        (["--model", "MODEL", "max_batch=3"], 2, "max_batch"),
        (["--model", "MODEL", "--host", "192.0.2.1"], 1, "cannot listen"),
        ([], 2, "--model"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_arguments_are_one_line_before_ray_starts(
    arguments: list[str],
    code: int,
    said: str,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = [str(tiny_model_dir) if item == "MODEL" else item for item in arguments]
    assert run(*given) == code
    assert said in error_line(capsys)


def test_addresses() -> None:
    assert address_to_show("0.0.0.0") == "127.0.0.1"
    assert address_to_show("::1") == "[::1]"
    assert address_to_show("10.1.2.3") == "10.1.2.3"
    check_port("127.0.0.1", free_port())
    with pytest.raises(DimError, match="cannot listen"):
        check_port("not-a-host.invalid", 8000)


def test_the_command_serves_until_it_is_stopped(tiny_model_dir: Path) -> None:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "serving.serve", "--model", str(tiny_model_dir)]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--designer", "none"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
    )  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        assert process.stdout is not None
        announced = process.stdout.readline()
        page = process.stdout.readline()
        example = process.stdout.readline()
        for path in ("/", "/page/page.js"):
            served = httpx.get(f"{url}{path}", timeout=10)
            assert served.status_code == 200 and served.headers["content-security-policy"]
        assert httpx.get(f"{url}/page/gone.js", timeout=10).json()["error"]["message"]
        assert httpx.get(f"{url}/v1/images/edits", timeout=10).status_code == 405
        assert httpx.get(f"{url}/healthz", timeout=10).json()["designers"] == ["none"]
        body = {"prompt": "a red circle", "steps": 1}
        painted = httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)
        assert painted.status_code == 200
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, err
    assert f"serving on {url} " in announced
    assert page.strip() == f"open this page: {url}/"
    assert f"curl -s {url}/v1/images/edits" in example
    assert "Traceback" not in err
