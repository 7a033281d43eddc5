"""What a client reads when something went wrong: a status, and one sentence in OpenAI's shape."""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Coroutine, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from dim.errors import BlueprintError, DesignerError, DimError, InputError, StorageError
from dim.failures import find_dim_error

logger = logging.getLogger("ray.serve")

NO_OBJECT = ("missing", "dict_type", "model_type", "model_attributes_type")
"""pydantic's errors where a body is no object at all."""


class BadRequestError(DimError):
    """The client sent something that is not a request this server understands."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class UnsupportedMediaTypeError(DimError):
    """The body is of a kind that this route does not read."""


class NotFoundError(DimError):
    """There is nothing of the name that the client said; ``code`` says of what kind."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class TooLargeError(DimError):
    """The request exceeds a limit on size."""


class BusyError(DimError):
    """As much work is admitted as the server takes on at once."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class SlowUploadError(DimError):
    """The request's body does not come in time."""


class RateLimitedError(DimError):
    """The client has asked for all that its key may ask for in a minute."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnauthorizedError(DimError):
    """There is no API key, or none that is known."""


class ForbiddenError(DimError):
    """The request comes from where this server takes none."""


class NotReadyError(DimError):
    """A deployment has no healthy replica at the moment."""


def error_response(error: BaseException) -> JSONResponse:
    """The response for ``error``, however often Ray wrapped it."""
    known = find_dim_error(error)
    if isinstance(known, BusyError):
        return _busy(str(known), known.retry_after_s)
    if isinstance(known, TooLargeError):
        return answer(413, str(known), "invalid_request_error", code="request_too_large")
    if isinstance(known, UnsupportedMediaTypeError):
        return answer(415, str(known), "invalid_request_error")
    if isinstance(known, NotFoundError):
        return answer(404, str(known), "invalid_request_error", param=known.param, code=known.code)
    if isinstance(known, SlowUploadError):
        # An answer in the middle of a body: nothing else can be asked on this connection.
        response = answer(408, str(known), "invalid_request_error", code="slow_upload")
        response.headers["Connection"] = "close"
        return response
    if isinstance(known, RateLimitedError):
        return answer(
            429, str(known), "rate_limit_error",
            code="rate_limit_exceeded", retry_after_s=known.retry_after_s,
        )  # fmt: skip
    if isinstance(known, UnauthorizedError):
        return answer(401, str(known), "authentication_error", code="invalid_api_key")
    if isinstance(known, ForbiddenError):
        return answer(403, str(known), "permission_error", code="forbidden")
    if isinstance(known, NotReadyError):
        return answer(503, str(known), "server_error", code="not_ready", retry_after_s=5)
    if isinstance(known, DesignerError):
        # The same question to the same designer costs again and answers the same: say so to SDKs.
        return answer(502, str(known), "designer_error", code="designer_failed", retry=False)
    if isinstance(known, StorageError):
        logger.error("the object store failed", exc_info=error)
        return answer(503, "the object store does not answer", "server_error")
    if isinstance(known, BadRequestError | InputError | BlueprintError):
        param = getattr(known, "param", None)
        return answer(400, str(known), "invalid_request_error", param=param)
    return _machine_error(error)


def _machine_error(error: BaseException) -> JSONResponse:
    for wrapped in _each(error):
        if isinstance(wrapped, BackPressureError):
            return _busy("the server is busy; try again later", 2)
        if isinstance(wrapped, TimeoutError | asyncio.TimeoutError):
            return answer(504, "the request took too long and was given up", "server_error")
        if isinstance(
            wrapped, DeploymentUnavailableError | ReplicaUnavailableError | RayActorError
        ):
            return answer(
                503, "a part of the server is restarting; try again", "server_error",
                code="not_ready", retry_after_s=5,
            )  # fmt: skip
    logger.error("a request failed", exc_info=error)
    return answer(500, "the server failed on this request; its log says why", "server_error")


def _each(error: BaseException) -> list[BaseException]:
    members = list(error.exceptions) if isinstance(error, BaseExceptionGroup) else []
    return [error, *members]


def _busy(message: str, retry_after_s: float) -> JSONResponse:
    return answer(429, message, "rate_limit_error", code="server_busy", retry_after_s=retry_after_s)


def answer(
    status: int,
    message: str,
    kind: str,
    *,
    param: str | None = None,
    code: str | None = None,
    retry_after_s: float | None = None,
    retry: bool | None = None,
) -> JSONResponse:
    """An error response. ``retry=False`` tells OpenAI's SDKs not to repeat the request."""
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    if retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(retry_after_s)))
    if retry is not None:
        headers["X-Should-Retry"] = str(retry).lower()
    body = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    return JSONResponse(body, status_code=status, headers=headers)


def on_http_error(_request: Request, error: Exception) -> JSONResponse:
    """Unknown paths and methods, and bodies over the limit, in the same shape as other errors."""
    status = error.status_code if isinstance(error, HTTPException) else 500
    said = error.detail if isinstance(error, HTTPException) else "internal error"
    if status == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return error_response(TooLargeError(str(said)))
    return answer(status, str(said), "invalid_request_error")


def on_invalid_body(request: Request, error: Exception) -> JSONResponse:
    """What FastAPI found wrong with a body that it read itself."""
    errors = error.errors() if isinstance(error, RequestValidationError) else []
    if errors and errors[0]["loc"][0] == "body" and not is_json(request):
        return error_response(UnsupportedMediaTypeError("the body must be application/json"))
    return error_response(wrong_field(errors))


def is_json(request: Request) -> bool:
    """Whether the body is said to be JSON."""
    return media_type(request) == "application/json"


def media_type(request: Request) -> str:
    """What the body is said to be, without parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def wrong_field(errors: Sequence[Any]) -> BadRequestError:
    """What is said of the first of pydantic's ``errors``."""
    first = errors[0]
    where = [part for part in first["loc"] if part not in ("body", "query", "header")]
    where += [field] if (field := first.get("ctx", {}).get("field")) else []
    if first["type"] == "json_invalid":
        return BadRequestError("the body is not valid JSON")
    if not where and first["type"] in NO_OBJECT:
        return BadRequestError("the body must be a JSON object")
    name = "".join(
        f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
        for place, part in enumerate(where)
    )
    said = f"{first['msg'][0].lower()}{first['msg'][1:]}"
    return BadRequestError(f"{name}: {said}" if name else said, param=name or None)


class OpenAIErrorRoute(APIRoute):
    """A route whose failures are answered by ``error_response``."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """FastAPI's handler for this route, with the errors caught."""
        handle = super().get_route_handler()

        async def guarded(request: Request) -> Response:
            try:
                return await handle(request)
            except (HTTPException, RequestValidationError):
                raise  # which the application answers, wherever they come from
            except ClientDisconnect:
                raise  # which nobody answers
            except Exception as error:
                return error_response(error)

        return guarded
