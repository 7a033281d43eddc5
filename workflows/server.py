"""A server that a workflow starts and that goes on when the workflow has ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pydantic import Field, model_validator

import dim.model
from dim.config import StrictModel, load_config
from dim.errors import DimError
from dim.model import ModelConfig
from infra.ports import free_port
from infra.storage import is_local, local_path
from serving.config import ServingConfig

_STARTS_WITHIN_S = 300.0
_READY = "server.json"
_ROOT = Path(__file__).resolve().parents[1]
_YAML = (".yaml", ".yml")
# Ray starts workers at a niceness of 15. People wait for a page and nobody for a step, so those of
# a server's own Ray start at 0.
_NICENESS = "RAY_worker_niceness"


class ServeStepConfig(ServingConfig):
    """``dim serve``, at a free port unless told otherwise, also of a model YAML."""

    port: int | None = Field(None, ge=1, le=65535)  # type: ignore[assignment]
    weights: dict[str, str] = Field(default_factory=dict)
    """Of the parts of a model YAML, where they are others than it says: ``painter``: address."""

    @model_validator(mode="after")
    def _yaml_has_parts(self) -> Self:
        if self.weights and not self.model.endswith(_YAML):
            raise ValueError("weights: only of a model YAML; a model folder holds its own")
        return self


class RolloutConfig(StrictModel):
    """Which model a running server goes on with."""

    server: str
    """Folder of the serve step that has started it."""
    model: str
    """Folder, object store address or ``models:/…``."""
    application: str = "dim"
    """Serve's name of the application."""


def start(config: ServeStepConfig, out: str) -> dict[str, Any]:
    """Start ``dim serve`` as a process of its own, and wait until it answers.

    Args:
        config: what it serves, and how.
        out: folder for its log, and for the model if that is a YAML; beside the current folder's
            where that is no local one.

    Returns:
        ``url`` (without a slash at its end), ``pid``, ``log``, and the address of its ``ray``.

    Raises:
        DimError: it ended, or did not answer in time.
    """
    port = config.port or free_port()
    folder = _folder(out)
    folder.mkdir(parents=True, exist_ok=True)
    given = config.model_dump(mode="json", exclude_unset=True, exclude={"weights"})
    given |= {"port": port, "model": _as_folder(config, folder)}
    settings = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    log, ready = folder / "server.log", folder / _READY
    ready.unlink(missing_ok=True)
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.serve", *settings, "--ready", str(ready)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=_ROOT,
            env={_NICENESS: "0", **os.environ},
        )
    try:
        _wait_for(ready, process, log)
    except BaseException:  # also when the user gives up: no server is left that nobody named
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    return _running(out) | {"log": str(log)}


def roll_out(config: RolloutConfig) -> dict[str, Any]:
    """Have a server go on with another model, without a failed request.

    Returns:
        ``url``, ``pid`` and ``ray`` of the server, and as ``serves`` what it says of its model.

    Raises:
        DimError: there is none, or it serves what it did before; the message says why.
    """
    server = _running(config.server)
    rollout = subprocess.run(
        [sys.executable, "-m", "serving.rollout", config.model, "--application",
         config.application],
        env=os.environ | {"RAY_ADDRESS": server["ray"]}, cwd=_ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    last = (rollout.stderr if rollout.returncode else rollout.stdout).strip().splitlines()[-1:]
    if rollout.returncode or not last:
        raise DimError(f"{server['url']}: {' '.join(last) or 'the rollout was killed'}")
    return server | {"serves": last[0]}


def moved(config: RolloutConfig, result: Mapping[str, Any]) -> str | None:
    """What a server that was moved to a model serves, if it still runs."""
    try:
        same = _running(config.server)["pid"] == result.get("pid")
    except DimError:
        return None
    return str(result["serves"]) if same and _answers(f"{result['url']}/livez") else None


def answering(config: ServeStepConfig, result: Mapping[str, Any]) -> str | None:
    """Whether a server that was started earlier answers; at which port is nobody's input."""
    url = str(result.get("url", ""))
    return "answers" if url and _answers(f"{url}/livez") else None


def stop(config: ServeStepConfig, result: Mapping[str, Any]) -> None:
    """End a server that was started earlier, if it still answers."""
    if answering(config, result) is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(result["pid"]), signal.SIGTERM)


def _as_folder(config: ServeStepConfig, out: Path) -> str:
    """The model's folder; of a model YAML it is made."""
    if not config.model.endswith(_YAML):
        return config.model
    weights = [f"{part}.weights={json.dumps(at)}" for part, at in config.weights.items()]
    model = dim.model.build(load_config(ModelConfig, config.model, weights))
    model.save(out / "model")
    return str(out / "model")


def _folder(out: str) -> Path:
    return Path(local_path(out)) if is_local(out) else Path.cwd()


def _running(out: str) -> dict[str, Any]:
    """What the server of the serve step in ``out`` has said of itself."""
    try:
        said: dict[str, Any] = json.loads((_folder(out) / _READY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DimError(f"no server was started in {out}") from None
    return said


def _wait_for(ready: Path, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise DimError(f"the server ended at once: {' '.join(last) or f'see {log}'}")
        if ready.exists():
            return
        time.sleep(0.2)
    raise DimError(f"the server did not answer within {_STARTS_WITHIN_S:.0f} s; see {log}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310, our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
