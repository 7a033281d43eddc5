"""An HTTP proxy in front of an object store that is busy and slow when a test says so."""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

BUSY = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
)
EXPIRED = (
    b'<?xml version="1.0" encoding="UTF-8"?>\n'
    b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
)


@dataclass
class FaultProxy:
    """A running proxy.

    ``busy(number)`` says of the request with that number (from 1) whether it is answered 503;
    ``delay(number)`` how many seconds later than it could be; ``expired(headers)`` whether it comes
    with credentials whose time is over.
    """

    url: str = ""
    busy: Callable[[int], bool] = lambda number: False
    delay: Callable[[int], float] = lambda number: 0.0
    expired: Callable[[Mapping[str, str]], bool] = lambda headers: False
    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def running(target: str) -> Iterator[FaultProxy]:
    """Stand in front of ``http://host:port`` until the block ends."""
    proxy = FaultProxy()
    host = urlsplit(target).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _handle(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            with proxy.lock:
                proxy.requests += 1
                number = proxy.requests
            time.sleep(proxy.delay(number))
            if proxy.busy(number):
                self._send(503, {"Content-Type": "application/xml"}, BUSY)
                return
            if proxy.expired(self.headers):
                self._send(400, {"Content-Type": "application/xml"}, EXPIRED)
                return
            upstream = http.client.HTTPConnection(host, timeout=60)
            upstream.request(self.command, self.path, body, dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            kept = {
                name: value
                for name, value in answer.getheaders()
                if name.lower() not in ("connection", "transfer-encoding", "date", "server")
            }
            self._send(answer.status, kept, data)
            upstream.close()

        def _send(self, status: int, headers: dict[str, str], body: bytes) -> None:
            with proxy.lock:
                proxy.statuses[status] += 1
            self.send_response(status)
            if not any(name.lower() == "content-length" for name in headers):
                headers = {**headers, "Content-Length": str(len(body))}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

        def log_message(self, format: str, *args: object) -> None:
            """Keep the test's output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield proxy
    server.shutdown()
    server.server_close()
