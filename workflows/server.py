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
from typing import Any

from pydantic import Field

from dim.errors import DimError
from infra.ports import free_port
from infra.storage import is_local, local_path
from serving.config import ServingConfig
from serving.serve import address_to_show

_STARTS_WITHIN_S = 300.0


class ServeStepConfig(ServingConfig):
    """``dim serve``, at a free port unless told otherwise."""

    port: int | None = Field(None, ge=1, le=65535)  # type: ignore[assignment]


def start(config: ServeStepConfig, out: str) -> dict[str, Any]:
    """Start ``dim serve`` as a process of its own, and wait until it answers.

    Args:
        config: what it serves, and how.
        out: folder for its log; beside the current folder's where that is no local one.

    Returns:
        ``url`` (without a slash at its end), ``pid`` and ``log``.

    Raises:
        DimError: it ended, or did not answer in time.
    """
    port = config.port or free_port()
    given = config.model_dump(mode="json", exclude_unset=True) | {"port": port}
    settings = [f"{name}={json.dumps(value)}" for name, value in given.items()]
    folder = Path(local_path(out)) if is_local(out) else Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serving.serve", *settings],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[1],
        )
    url = f"http://{address_to_show(config.host)}:{port}{config.route_prefix.rstrip('/')}"
    try:
        _wait_for(f"{url}/livez", process, log)
    except BaseException:  # also when the user gives up: no server is left that nobody named
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        raise
    return {"url": url, "pid": process.pid, "log": str(log)}


def answering(config: ServeStepConfig, result: Mapping[str, Any]) -> str | None:
    """The URL of a server that was started earlier, if it answers."""
    url = str(result.get("url", ""))
    return url if url and _answers(f"{url}/livez") else None


def stop(config: ServeStepConfig, result: Mapping[str, Any]) -> None:
    """End a server that was started earlier, if it still answers."""
    if answering(config, result) is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(int(result["pid"]), signal.SIGTERM)


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _STARTS_WITHIN_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise DimError(f"the server ended at once: {' '.join(last) or f'see {log}'}")
        if _answers(url):
            return
        time.sleep(0.5)
    raise DimError(f"the server did not answer within {_STARTS_WITHIN_S:.0f} s; see {log}")


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310, our own server
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
