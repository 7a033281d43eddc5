"""A web server of images that can misbehave in every way a real one does."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

Answer = Callable[[BaseHTTPRequestHandler], None]


def ok(data: bytes, **headers: str) -> Answer:
    """A whole answer; an underscore in a header's name stands for a dash."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", str(len(data)))
        request.end_headers()
        request.wfile.write(data)

    return answer


def status(code: int, **headers: str) -> Answer:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def endless(request: BaseHTTPRequestHandler) -> None:
    """A body without a length that goes on until the reader has had enough, or for 100 MB."""
    request.send_response(200)
    request.end_headers()
    for _ in range(1600):
        request.wfile.write(b"x" * 65536)


def cut_short(request: BaseHTTPRequestHandler) -> None:
    request.send_response(200)
    request.send_header("Content-Length", "1000")
    request.end_headers()
    request.wfile.write(b"half")
    request.close_connection = True


def hanging(request: BaseHTTPRequestHandler) -> None:
    time.sleep(3)


def in_turn(*answers: Answer) -> Answer:
    """One after the other; the last one stays."""
    left = list(answers)
    return lambda request: (left.pop(0) if len(left) > 1 else left[0])(request)


class ImageServer:
    """What each path answers, and how it was asked.

    Attributes:
        answers: by path.
        asked: requests by path.
        times: when each request came.
        most: requests in flight at once, at most.
    """

    def __init__(self, address: str) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.most = 0
        self._now, self._lock = 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                with outer._lock:
                    outer.asked[self.path] += 1
                    outer.times.append(time.monotonic())
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    with suppress(OSError):
                        outer.answers.get(self.path, status(404))(self)
                finally:
                    with outer._lock:
                        outer._now -= 1

            def log_message(self, *args: object) -> None:
                return

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_address[1]
        self.url = f"http://{address}:{self.port}"

    def start(self) -> None:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def serving(address: str = "127.0.0.1") -> Iterator[ImageServer]:
    """A running server of this machine."""
    server = ImageServer(address)
    server.start()
    try:
        yield server
    finally:
        server.stop()
