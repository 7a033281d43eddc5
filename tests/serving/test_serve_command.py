from __future__ import annotations

import importlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dim import cli
from dim.errors import ConfigError, DimError
from infra.ports import free_port
from serving.app import read_args
from serving.config import ServingConfig
from serving.exposure import check_exposure
from serving.serve import ONE_LOOP, address_to_show, check_port, read_settings, start_ray

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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
        (["--model", "MODEL", "--designer", "a=gtp4"], 1, "unknown designer 'gtp4'"),
        (["--model", "MODEL", "--designer", "gtp4"], 2, "write NAME=gtp4"),
        (["--model", "MODEL", "--designer", "old=replay:gone.jsonl"], 1, "gone.jsonl"),
        (["--model", "MODEL", "--port", "99999"], 2, "port"),
        (["--model", "MODEL", "max_batch=3"], 2, "max_batch"),
        (["--model", "MODEL", "--host", "192.0.2.1", "--insecure"], 1, "cannot listen"),
        (["--model", "MODEL", "--host", "0.0.0.0"], 2, "without API keys whoever reaches"),
        (["--model", "MODEL", "--keys", "gone.yaml"], 2, "cannot read the API keys of gone.yaml"),
        (["--model", "MODEL", "step_cache=0.1", "adapters={a: x}"], 2, "does not go with adapters"),
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


def test_eight_bits_without_torchao_are_one_line(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    assert run("--model", tiny_model_dir, "int8=true") == 1
    assert "need torchao" in error_line(capsys)


def test_a_file_with_settings_and_options_on_top(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: a\nport: 8001\ndesigners: {best: {spec: self}, fast: self}\n")
    config = read_settings(
        [str(file), "designers.best.spec=oracle", "port=8003"], {"port": 8002, "insecure": True}
    )
    assert (config.model, config.port, config.insecure) == ("a", 8003, True)
    assert config.offered == ["best", "fast", "none"]
    assert read_settings([str(file)], {"model": "b", "designers": {"x": "self"}}).model == "b"
    with pytest.raises(ConfigError, match="configuration file not found: gone.yaml"):
        read_settings(["gone.yaml"], {})
    with pytest.raises(ConfigError, match="serve.yaml: unknown key 'max_batchsize'"):
        read_settings([str(file), "max_batchsize=3"], {})


def of_ours(file: Path) -> tuple[ServingConfig, str]:
    """What a file of `dim serve` says, and where it listens."""
    config = read_settings([str(file)], {})
    return config, config.host


def of_serve(file: Path) -> tuple[ServingConfig, str]:
    """What a file of `serve deploy` says."""
    schema = ServeDeploySchema.model_validate(yaml.safe_load(file.read_text()))
    (application,) = schema.applications
    module, _, build = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), build))
    return read_args(application.args), schema.http_options.host


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("serve-*.yaml")), ids=lambda file: file.name)
def test_the_shipped_configurations_are_valid_and_none_is_open_to_all(file: Path) -> None:
    config, host = of_serve(file) if file.name == "serve-deploy.yaml" else of_ours(file)
    check_exposure(config, host)
    assert [name for name in config.designers if config.designers[name].is_own]


def test_a_ray_of_ones_own_has_one_loop_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    said = dict(ONE_LOOP)
    kept, other = said
    monkeypatch.setenv(kept, "1")
    monkeypatch.delenv(other, raising=False)
    seen: list[dict[str, str]] = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(dict(os.environ)))
    start_ray()
    assert (seen[0][kept], seen[0][other]) == ("1", "0")
    assert other not in os.environ and os.environ[kept] == "1"


def test_addresses() -> None:
    assert address_to_show("0.0.0.0") == "127.0.0.1"
    assert address_to_show("::1") == "[::1]"
    assert address_to_show("10.1.2.3") == "10.1.2.3"
    check_port("127.0.0.1", free_port())
    with pytest.raises(DimError, match="cannot listen"):
        check_port("not-a-host.invalid", 8000)


def ask_for_much(url: str) -> httpx.Response:
    """A request that is still being painted when the server is told to stop."""
    body = {"prompt": "a red circle", "n": 10, "steps": 100}
    return httpx.post(f"{url}/v1/images/generations", json=body, timeout=60)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_the_command_serves_until_it_is_stopped_and_answers_what_it_took_on(
    tiny_model_dir: Path,
) -> None:
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
        with ThreadPoolExecutor(1) as pool:
            taken = pool.submit(ask_for_much, url)
            until(lambda: httpx.get(f"{url}/healthz", timeout=10).json()["pending_images"] == 10)
            assert not taken.done()
            process.send_signal(signal.SIGTERM)
            answered = taken.result()
        _, err = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            process.kill()
    assert process.returncode == 0, err
    assert answered.status_code == 200, answered.text
    assert len(answered.json()["data"]) == 10
    assert f"serving on {url} " in announced
    assert page.strip() == f"open this page: {url}/"
    assert f"curl -s {url}/v1/images/edits" in example
    assert "Traceback" not in err
