"""Bodies that come in: each takes a place while it does, and has to come fast enough.

Without it, a few sockets that send a byte now and then hold every request that a replica takes on.
"""

from __future__ import annotations

import asyncio
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.config import UploadLimits
from serving.errors import BusyError, SlowUploadError, error_response

_TOO_YOUNG_S = 0.25  # to be called slow


class Uploads:
    """The uploads of one replica. Used from one event loop."""

    def __init__(self, limits: UploadLimits) -> None:
        self._limits = limits
        self._running: set[Upload] = set()

    async def receive_for(self, app: ASGIApp, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request with ``app``, which is given the body as it comes in time.

        What ``app`` answers to a body that does not is not sent; 408 is. Where all places are taken
        by uploads that are fast enough, it is 429.
        """
        try:
            self._make_room()
        except BusyError as error:
            await error_response(error)(scope, receive, send)
            return
        upload = Upload(self._limits, self._running)
        try:
            await app(scope, upload.timed(receive), upload.unless_late(send))
        except Exception:
            if upload.fault is None:
                raise
        finally:
            self._running.discard(upload)
        if upload.fault is not None:
            await error_response(upload.fault)(scope, receive, send)

    def _make_room(self) -> None:
        """Where there is none, give up the slowest upload, if it is too slow."""
        if len(self._running) < self._limits.places:
            return
        slow = [upload for upload in self._running if upload.is_slow()]
        if not slow:
            raise BusyError(
                f"the server is busy with {len(self._running)} uploads", self._limits.grace_s
            )
        min(slow, key=Upload.bytes_per_s).give_up("is too slow while others wait")


class Upload:
    """One body on its way, in the set of those that are ``running`` until it is there."""

    def __init__(self, limits: UploadLimits, running: set[Upload]) -> None:
        self.fault: SlowUploadError | None = None
        self._limits = limits
        self._running = running
        self._started = time.monotonic()
        self._received = 0
        self._waiting: asyncio.Timeout | None = None
        running.add(self)

    def bytes_per_s(self) -> float:
        """Since it began."""
        return self._received / max(self._age(), 1e-6)

    def is_slow(self) -> bool:
        """Whether it would be given up if it went on so."""
        return self._age() > _TOO_YOUNG_S and self.bytes_per_s() < self._limits.least_bytes_per_s

    def give_up(self, why: str) -> None:
        """Wait for no more of it."""
        self.fault = SlowUploadError(f"the request's body {why}")
        self._running.discard(self)
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(0.0)

    def timed(self, receive: Receive) -> Receive:
        """``receive``, which raises ``SlowUploadError`` when the body takes too long."""

        async def receive_in_time() -> Message:
            if self.fault is not None:
                raise self.fault
            if self not in self._running:  # the body is there, and this waits for the client to go
                return await receive()
            try:
                async with asyncio.timeout(self._seconds_left()) as self._waiting:
                    message = await receive()
            except TimeoutError:
                if self.fault is None:
                    self.give_up(f"did not come in {self._age():.0f} s or too slowly")
                raise self.fault or TimeoutError from None
            finally:
                self._waiting = None
            self._received += len(message.get("body", b""))
            if not message.get("more_body", False):
                self._running.discard(self)
            return message

        return receive_in_time

    def unless_late(self, send: Send) -> Send:
        """``send``, as long as the body comes in time."""

        async def send_unless_late(message: Message) -> None:
            if self.fault is None:
                await send(message)

        return send_unless_late

    def _seconds_left(self) -> float:
        """Until it is over its time, or under the least rate, if nothing more comes."""
        limits = self._limits
        at_this_rate = limits.grace_s + self._received / limits.least_bytes_per_s
        return max(0.0, min(limits.timeout_s, at_this_rate) - self._age())

    def _age(self) -> float:
        return time.monotonic() - self._started
