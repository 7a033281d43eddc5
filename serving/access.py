"""The outermost middleware: every request has an id, a line in the access log, and is counted.

The id is that of ``X-Request-ID``. Serve's proxy makes one where a client sends none, answers with
it, and puts it into every line that is logged for the request, in whichever deployment.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
import uuid
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI
from fastapi.routing import APIRoute
from ray import serve
from ray.exceptions import TaskCancelledError
from ray.serve.exceptions import RayServeException
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving import account
from serving.account import Account
from serving.config import AccessLogConfig
from serving.errors import BadRequestError, error_response
from serving.guard import OPEN, route_path

REQUEST_ID = "x-request-id"
OTHER = "other"
"""Route of what is none: paths are the clients' and have no end."""

CLIENT_GONE = 499
"""Status in the log where a client went before there was an answer; nginx's number."""

_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
_MOST_PROMPT = 2000


class Counted(Protocol):
    """Where finished requests are counted."""

    def request(self, route: str, status: int, seconds: float, account: Account) -> None:
        """Count one."""


class Observed:
    """``app`` with ids, access log and metrics.

    Args:
        app: behind it.
        log: where lines go; ``None``: nowhere.
        counted: where requests are counted.
    """

    def __init__(self, app: ASGIApp, log: AccessLog | None, counted: Counted) -> None:
        self._app = app
        self._log = log
        self._counted = counted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app; what is not HTTP goes by."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = Seen(receive, send, scope)
        noted, started = account.begin(), time.perf_counter()
        app = self._app if seen.id is not None else error_response(_bad_id())
        try:
            await app(scope, seen.receive, seen.send)
        except ClientDisconnect:  # in the middle of its body: there is nobody to answer
            pass
        except Exception:
            seen.status = seen.status or 500
            raise
        finally:
            seconds, route = time.perf_counter() - started, route_of(scope)
            self._counted.request(route, seen.outcome, seconds, noted)
            if self._log is not None:
                self._log.write(line(scope, route, seen, seconds, noted, self._log.prompts))


class Seen:
    """What became of a request, as it goes by.

    Attributes:
        id: of the request; ``None`` if the client's cannot be taken.
        status: of the answer; 0 until it begins.
        gone: whether the client went before that.
        complete: whether the answer was sent to its end.
    """

    def __init__(self, receive: Receive, send: Send, scope: Scope) -> None:
        self._receive, self._send = receive, send
        given = Headers(scope=scope).get(REQUEST_ID)
        self._is_new = given is None  # Serve's proxy gives one to all, and answers with it
        given = uuid.uuid4().hex if given is None else given
        self.id = given if _ID.fullmatch(given) else None
        self.status = 0
        self.gone = False
        self.complete = False

    @property
    def outcome(self) -> int:
        """The status that is logged and counted."""
        return CLIENT_GONE if self.gone else self.status or CLIENT_GONE

    async def receive(self) -> Message:
        """As of ASGI. Serve raises where its proxy waits no more for a client that has gone."""
        try:
            message = await self._receive()
        except TaskCancelledError:
            message = {"type": "http.disconnect"}
        if message["type"] == "http.disconnect" and not self.status:
            self.gone = True
        return message

    async def send(self, message: Message) -> None:
        """As of ASGI."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self._is_new:
                MutableHeaders(scope=message)[REQUEST_ID] = str(self.id)
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.complete = not self.gone


class AccessLog:
    """One JSON object a line, in a file of this process or on its standard output."""

    def __init__(self, config: AccessLogConfig) -> None:
        self.prompts = config.prompts
        self._logger = logging.Logger("access")  # nobody's child: its lines stay as they are
        self._logger.addHandler(_handler(config))

    def write(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self._logger.info(json.dumps(line))


def open_log(config: AccessLogConfig | None) -> AccessLog | None:
    """The access log that a server is configured with; ``None`` if it has none."""
    return None if config is None else AccessLog(config)


def line(
    scope: Scope, route: str, seen: Seen, seconds: float, noted: Account, prompts: bool
) -> dict[str, Any]:
    """What the log says of a request: nothing of a picture, and of texts the prompt if asked to."""
    said = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "request_id": seen.id,
        "client": scope.get("state", {}).get("client"),
        "method": scope["method"][:16],
        "route": route,
        "status": seen.outcome,
        "complete": seen.complete,
        "ms": round(1000 * seconds, 1),
        "designed_ms": round(1000 * noted.designed_s, 1),
        "waited_ms": round(1000 * noted.waited_s, 1),
        "painted_ms": round(1000 * noted.painted_s, 1),
        "images": round(noted.images),
        "megapixel_steps": round(noted.megapixel_steps, 4),
    }
    return {**said, "prompt": noted.prompt[:_MOST_PROMPT]} if prompts else said


def route_of(scope: Scope) -> str:
    """The route of a request as the application describes it, also where none was reached."""
    found = scope.get("route")
    if isinstance(found, APIRoute):
        return found.path
    path, app = route_path(scope), scope.get("app")
    known = app.openapi()["paths"] if isinstance(app, FastAPI) else ()
    return path if path in known or path in OPEN else OTHER


def _bad_id() -> BadRequestError:
    return BadRequestError(
        "X-Request-ID: 1 to 128 of letters, digits and '._:/+=-'; or leave it out",
        param="X-Request-ID",
    )


def _handler(config: AccessLogConfig) -> logging.Handler:
    if config.to == "stdout":
        return logging.StreamHandler(sys.stdout)
    folder = Path(config.to)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"access-{_process()}.jsonl"
    most = int(config.max_megabytes * 1e6)
    return RotatingFileHandler(file, maxBytes=most, backupCount=config.keep, encoding="utf-8")


def _process() -> str:
    """What tells the files of several replicas apart, of which each has a process."""
    try:
        return f"{serve.get_replica_context().replica_id.unique_id}"
    except RayServeException:
        return str(os.getpid())
