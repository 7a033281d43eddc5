"""The door: which requests come in at all, before any route sees them.

In this order: the name the server is called by, the page the request comes from, the API key, how
many requests its client may make, and how fast the body comes.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlsplit

from fastapi import Request
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dim.errors import DimError
from serving.config import Rates, ServingConfig
from serving.errors import (
    BadRequestError,
    ForbiddenError,
    RateLimitedError,
    UnauthorizedError,
    error_response,
)
from serving.keys import Client, Keys
from serving.rates import Verdict
from serving.uploads import Uploads
from serving.work import Work

HEALTH = ("/livez", "/readyz", "/healthz")
OPEN = frozenset((*HEALTH, "/", "/favicon.ico", "/docs", "/redoc", "/openapi.json"))
OPEN_BELOW = ("/page/", "/docs/")
"""What is read without a key: probes, the page's files, the description of the API."""

METRICS = "/metrics"
ANONYMOUS = "anonymous"


class Guard:
    """Lets requests in, or answers them.

    Args:
        config: who may come in.
        meter: the ``RateMeter`` deployment; ``None`` where nobody's rate is limited.

    Raises:
        ConfigError: the keys cannot be read.
    """

    def __init__(self, config: ServingConfig, meter: DeploymentHandle | None = None) -> None:
        self._config = config
        self._meter = meter
        self._uploads = Uploads(config.uploads)
        self._keys = None if config.keys is None else Keys(config.keys, config.rates)

    def around(self, app: ASGIApp) -> ASGIApp:
        """``app`` behind this guard."""
        inside: ASGIApp = partial(self._with_key, app)
        if self._config.origins:
            inside = CORSMiddleware(
                inside,
                allow_origins=self._config.origins,
                allow_methods=("GET", "POST", "DELETE"),
                # OpenAI's SDK sends headers of its own; the origin is trusted with any.
                allow_headers=("*",),
                expose_headers=("*",),
            )
        return partial(self._from_where, inside)

    async def _from_where(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        try:
            if route_path(scope) not in HEALTH:
                self._check_host(headers.get("host", ""))
            self._check_origin(headers.get("origin"), headers.get("host", ""))
        except DimError as error:
            app = error_response(error)
        await app(scope, receive, send)

    async def charge(self, request: Request, work: Work) -> None:
        """Count ``work`` against what the client of ``request`` may ask for in a minute.

        Raises:
            RateLimitedError: it has asked for all of it; nothing is counted.
            BadRequestError: it is more than it may ever ask for at once.
        """
        wants = {"images": work.images, "megapixel_steps": work.megapixel_steps}
        await self._take(asking_of(request), wants)

    async def _with_key(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        if is_open(scope) or (self._config.open_metrics and is_read(scope, METRICS)):
            await app(scope, receive, send)
            return
        try:
            asking = Asking(await self._client(Headers(scope=scope)))
        except DimError as error:
            await error_response(error)(scope, receive, send)
            return
        scope.setdefault("state", {}).update(asking=asking, client=asking.client.name)
        send = asking.telling(send)
        if scope["method"] in ("GET", "HEAD"):
            await app(scope, receive, send)
            return
        try:
            await self._take(asking, {"requests": 1})
        except Exception as error:  # also the meter's, when it is restarting
            await error_response(error)(scope, receive, send)
            return
        await self._uploads.receive_for(app, scope, receive, send)

    async def _take(self, asking: Asking, wants: Mapping[str, float]) -> None:
        client = asking.client
        if self._meter is None or client.rates == Rates():
            return
        verdict: Verdict = await self._meter.take.remote(client.name, client.rates, wants)
        asking.headers |= verdict.headers
        if verdict.lacking is None:
            return
        kind = verdict.lacking.replace("_", "-")
        allowed = getattr(client.rates, f"{verdict.lacking}_per_minute")
        said = f"{client.name!r} may ask for {allowed:g} {kind} a minute"
        if math.isinf(verdict.retry_after_s):
            raise BadRequestError(f"{said}, and this request is {wants[verdict.lacking]:,.0f}")
        raise RateLimitedError(
            f"{said}, and has; try again in {math.ceil(verdict.retry_after_s)} s",
            verdict.retry_after_s,
        )

    async def _client(self, headers: Headers) -> Client:
        if self._keys is None:
            return Client(ANONYMOUS, self._config.rates)
        given = headers.get("authorization")
        if given is None:
            raise UnauthorizedError("an API key is needed, in the header 'Authorization: Bearer …'")
        client = await self._keys.client(given)
        if client is None:
            raise UnauthorizedError("the API key is not known here")
        return client

    def _check_host(self, host: str) -> None:
        """Refuse a name that any page could have pointed here, to be of one origin with us."""
        if self._keys is not None and not self._config.hosts:
            return  # such a page has no key
        name = hostname(host)
        if is_address(name) or name == "localhost":
            return
        if not any(matches(name, known) for known in self._config.hosts):
            raise ForbiddenError(
                f"this server does not answer to the name {name[:253]!r}; it is one of its setting "
                "'hosts' that it does, or its address"
            )

    def _check_origin(self, origin: str | None, host: str) -> None:
        """Refuse what a page of another site asks for."""
        if origin is None or netloc(origin) == host.lower():
            return
        if not {"*", origin.lower()} & set(self._config.origins):
            raise ForbiddenError(
                "pages of other sites may not call this server; its setting 'origins' says which do"
            )


@dataclass
class Asking:
    """A request on its way: whose it is, and what its answer says of the client's rates."""

    client: Client
    headers: dict[str, str] = field(default_factory=dict)

    def telling(self, send: Send) -> Send:
        """``send``, with these headers in the answer."""

        async def tell(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(self.headers)
            await send(message)

        return tell


class Guarded:
    """The middleware: ``app`` behind ``guard``."""

    def __init__(self, app: ASGIApp, guard: Guard) -> None:
        self._app = app
        self._guarded = guard.around(app)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """An ASGI app; what is not HTTP is not guarded, for it asks for nothing."""
        app = self._guarded if scope["type"] == "http" else self._app
        await app(scope, receive, send)


def asking_of(request: Request) -> Asking:
    """Who asks, of a request that was let in."""
    asking: Asking = request.scope["state"]["asking"]
    return asking


def is_address(name: str) -> bool:
    """Whether ``name`` is an IP address, which no name server can point elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def hostname(host: str) -> str:
    """The name in a ``Host`` header, without its port; empty if there is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def netloc(origin: str) -> str | None:
    """Host and port of an ``Origin`` header; ``None`` for what is no origin, such as ``null``."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


def matches(name: str, known: str) -> bool:
    """Whether ``name`` is ``known``, or below it where that begins with ``*.``."""
    known = known.lower()
    return known in ("*", name) or (known.startswith("*.") and name.endswith(known[1:]))


def route_path(scope: Scope) -> str:
    """The path of a request within the application, whatever prefix it is served below."""
    return scope["path"].removeprefix(scope.get("root_path", "").rstrip("/")) or "/"


def is_open(scope: Scope) -> bool:
    """Whether a request is answered without a key."""
    path = route_path(scope)
    return is_read(scope, path) and (path in OPEN or path.startswith(OPEN_BELOW))


def is_read(scope: Scope, path: str) -> bool:
    """Whether a request only reads what is at ``path``."""
    return scope["method"] in ("GET", "HEAD") and route_path(scope) == path
