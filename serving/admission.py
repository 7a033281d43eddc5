"""How much work is let in: a bounded amount of each kind, and a word on when to come back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from serving.config import ServingConfig
from serving.errors import BadRequestError, BusyError
from serving.work import Work

SMOOTHING = 0.2


class Admission:
    """Counts the work admitted and not yet answered; refuses what goes over the limit.

    The refusal comes before designer and painter see the request, so that a full server spends
    nothing on what it cannot serve. Used from one event loop.

    Args:
        limit: of images, megapixels in memory, and megapixel-steps, each.
    """

    def __init__(self, limit: Work) -> None:
        self.limit = limit
        self.pending = Work()
        self._seconds_per_request = 1.0

    def refuse_when_full(self) -> None:
        """Refuse before anything of the request's body is read.

        Raises:
            BusyError: there is no room for a single image.
        """
        if self.pending.images >= self.limit.images:
            raise self._busy("images")

    @contextmanager
    def admit(self, work: Work) -> Iterator[None]:
        """Hold places for ``work`` while its request is served.

        Raises:
            BadRequestError: there would be no room for it if it were alone.
            BusyError: there is no room; it says after how many seconds there should be.
        """
        pending, limit = self.pending.amounts(), self.limit.amounts()
        for kind, amount in work.amounts().items():
            if amount > limit[kind]:
                raise BadRequestError(
                    f"the request is {amount:,.0f} {_said(kind)}, more than the {limit[kind]:,.0f} "
                    "that this server takes on at once; ask for fewer or smaller images, or steps"
                )
            if pending[kind] + amount > limit[kind]:
                raise self._busy(kind)
        self._add(work, 1)
        started = time.monotonic()
        try:
            yield
            self._learn(time.monotonic() - started)
        finally:
            self._add(work, -1)

    def _busy(self, kind: str) -> BusyError:
        pending, limit = self.pending.amounts()[kind], self.limit.amounts()[kind]
        return BusyError(
            f"the server is busy with {pending:,.0f} {_said(kind)} (limit {limit:,.0f})",
            retry_after_s=min(60.0, self._seconds_per_request),
        )

    def _add(self, work: Work, sign: int) -> None:
        pending = self.pending.amounts()
        if sign < 0 and work.images >= pending["images"]:
            self.pending = Work()  # nothing is left, and no rounding either
            return
        self.pending = Work(
            **{kind: pending[kind] + sign * amount for kind, amount in work.amounts().items()}
        )

    def _learn(self, seconds: float) -> None:
        self._seconds_per_request += SMOOTHING * (seconds - self._seconds_per_request)


def room(config: ServingConfig) -> Work:
    """How much one ingress of this configuration takes on at once."""
    return Work(
        images=config.max_pending,
        megapixels=config.max_pending_megapixels,
        megapixel_steps=config.max_pending_megapixel_steps,
    )


def _said(kind: str) -> str:
    return kind.replace("_", "-")
