"""How large a request may be, said or unsaid.

Starlette has such a middleware, which FastAPI offers as ``max_body_size``, but it answers in plain
text where the size is declared, and clients read OpenAI's shape.
"""

from __future__ import annotations

from http import HTTPStatus

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import TooLargeError, error_response


class BodyLimit:
    """Middleware that refuses bodies of more than ``max_bytes``: by what they say, else counted."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        said = Headers(scope=scope).get("content-length", "")
        if said.isdigit() and int(said) > self.max_bytes:
            response = error_response(TooLargeError(self._sentence(f"{int(said):,}")))
            return await response(scope, receive, send)
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self.max_bytes:
                # FastAPI, which reads the body, lets nothing else through as it is.
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, self._sentence("too many"))
            return message

        await self.app(scope, counted, send)

    def _sentence(self, size: str) -> str:
        return f"the request has {size} bytes; at most {self.max_bytes:,} are allowed"
