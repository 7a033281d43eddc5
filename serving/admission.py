"""How much work is let in: a bounded number of images, and a word on when to come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from serving.errors import BusyError

SMOOTHING = 0.2


class Admission:
    """Counts the images admitted and not yet answered; refuses what goes over the limit.

    The refusal comes before designer and painter see the request, so that a full server spends
    nothing on what it cannot serve. Used from one event loop.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.pending = 0
        self._seconds_per_request = 1.0

    def refuse_when_full(self) -> None:
        """Refuse before anything of the request's body is read.

        Raises:
            BusyError: there is no room for a single image.
        """
        if self.pending >= self.limit:
            raise self._busy()

    @contextmanager
    def admit(self, images: int) -> Iterator[None]:
        """Hold places for ``images`` while their request is served.

        Raises:
            BusyError: there is no room; it says after how many seconds there should be.
        """
        if self.pending + images > self.limit:
            raise self._busy()
        self.pending += images
        started = time.monotonic()
        try:
            yield
            self._learn(time.monotonic() - started)
        finally:
            self.pending -= images

    def _busy(self) -> BusyError:
        return BusyError(
            f"the server is busy with {self.pending} images (limit {self.limit})",
            retry_after_s=min(60.0, self._seconds_per_request),
        )

    def _learn(self, seconds: float) -> None:
        self._seconds_per_request += SMOOTHING * (seconds - self._seconds_per_request)
