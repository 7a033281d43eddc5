"""A chat completions server for tests, which answers as it is told, rightly or wrongly."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

JSON = "application/json"


@dataclass
class Response:
    """What the server sends: a status, a body and its type."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: dict[str, str] = field(default_factory=dict)
    pieces: Iterable[bytes] = ()
    """Sent one after the other instead of ``body``, as they come; then the connection ends."""


def completion(
    text: str | None,
    finish_reason: str = "stop",
    tokens: tuple[int, int] = (1, 1),
    **message: Any,
) -> Response:
    """A well-formed answer with ``text``, for so many tokens in and out."""
    return Response(
        json.dumps(
            {
                "id": "chatcmpl-1",
                "object": "chat.completion",
                "created": 1,
                "model": "test",
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": finish_reason,
                        "message": {"role": "assistant", "content": text, **message},
                    }
                ],
                "usage": {
                    "prompt_tokens": tokens[0],
                    "completion_tokens": tokens[1],
                    "total_tokens": sum(tokens),
                },
            }
        ).encode()
    )


def streamed(
    texts: Iterable[str],
    finish_reason: str | None = "stop",
    tokens: tuple[int, int] | None = (1, 1),
    name: str = "content",
) -> Response:
    """A stream of ``texts``, as they come, and then of why it ended and what it took."""

    def pieces() -> Iterator[bytes]:
        yield event({"choices": [{"index": 0, "delta": {"role": "assistant", name: ""}}]})
        for text in texts:
            yield event({"choices": [{"index": 0, "delta": {name: text}, "finish_reason": None}]})
        if finish_reason is not None:
            end = {"index": 0, "delta": {}, "finish_reason": finish_reason}
            yield event({"choices": [end], "usage": None})
            if tokens is not None:
                usage = {"prompt_tokens": tokens[0], "completion_tokens": tokens[1]}
                yield event({"choices": [], "usage": usage})
            yield b"data: [DONE]\n\n"

    return Response(b"", content_type="text/event-stream; charset=utf-8", pieces=pieces())


def event(data: dict[str, Any]) -> bytes:
    """One of OpenAI's events."""
    return b"data: " + json.dumps(data).encode() + b"\n\n"


@dataclass
class ChatServer:
    """A running server: its address, what it was asked, and what it does next."""

    url: str
    respond: Callable[[dict[str, Any]], Response]
    requests: list[dict[str, Any]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def texts(self) -> list[str]:
        """The text part of every request so far."""
        return [text_of(request) for request in self.requests]


def text_of(request: dict[str, Any]) -> str:
    """The text that a request asks."""
    content = request["messages"][0]["content"]
    return "".join(part["text"] for part in content if part["type"] == "text")


def images_of(request: dict[str, Any]) -> list[str]:
    """The image URLs of a request, in order."""
    content = request["messages"][0]["content"]
    return [part["image_url"]["url"] for part in content if part["type"] == "image_url"]


@contextmanager
def running(respond: Callable[[dict[str, Any]], Response]) -> Iterator[ChatServer]:
    """Serve on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length = int(self.headers["Content-Length"])
            request = json.loads(self.rfile.read(length))
            with server.lock:
                login = self.headers.get("Authorization")
                server.requests.append({**request, "path": self.path, "login": login})
            response = server.respond(request)
            self.send_response(response.status)
            self.send_header("Content-Type", response.content_type)
            if response.pieces:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(response.body)))
            for name, value in response.headers.items():
                self.send_header(name, value)
            with suppress(ConnectionError):  # who asked may have given up
                self.end_headers()
                self.wfile.write(response.body)
                for piece in response.pieces:
                    self.wfile.write(piece)

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    httpd.daemon_threads = True
    server = ChatServer(f"http://127.0.0.1:{httpd.server_address[1]}/v1", respond)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        httpd.shutdown()
        httpd.server_close()
