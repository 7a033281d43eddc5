"""What each client may ask for in a minute, counted in one place for all ingress replicas."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from serving.config import Rates

MINUTE = 60.0


@dataclass(frozen=True)
class Verdict:
    """Whether a client may have what it wants.

    Attributes:
        lacking: the kind of which there is not enough; ``None``: it may.
        retry_after_s: until there is; infinite if there never is, for it is over the limit alone.
        headers: how much there is, in OpenAI's header names.
    """

    lacking: str | None
    retry_after_s: float
    headers: Mapping[str, str]


class RateMeter:
    """A token bucket for each client and kind: full at first, and full again after a minute.

    A deployment of one replica, so that the count is one however many ingress replicas ask. It
    lives in memory: when the replica is replaced, all buckets are full.
    """

    def __init__(self) -> None:
        self._buckets: dict[tuple[str, str], Bucket] = {}

    async def take(self, client: str, rates: Rates, wants: Mapping[str, float]) -> Verdict:
        """Take what ``client`` wants, all of it or nothing.

        Args:
            client: its name.
            rates: what it may ask for.
            wants: amounts by ``requests``, ``images``, ``megapixel_steps``.
        """
        return self.take_at(client, rates, wants, time.monotonic())

    def take_at(self, client: str, rates: Rates, wants: Mapping[str, float], now: float) -> Verdict:
        """As ``take``, at ``now`` in seconds of one monotonic clock."""
        buckets = {}
        for kind in wants:
            per_minute = getattr(rates, f"{kind}_per_minute")
            if per_minute is not None:
                buckets[kind] = self._bucket(client, kind, per_minute, now)
        waits = {kind: bucket.wait_s(wants[kind]) for kind, bucket in buckets.items()}
        lacking = max(waits, key=lambda kind: waits[kind], default=None)
        if lacking is not None and waits[lacking] <= 0:
            lacking = None
        if lacking is None:
            for kind, bucket in buckets.items():
                bucket.level -= wants[kind]
        headers: dict[str, str] = {}
        for kind, bucket in buckets.items():
            headers |= bucket.headers(kind.replace("_", "-"))
        return Verdict(lacking, waits[lacking] if lacking else 0.0, headers)

    def _bucket(self, client: str, kind: str, per_minute: float, now: float) -> Bucket:
        bucket = self._buckets.get((client, kind))
        if bucket is None or bucket.per_minute != per_minute:
            bucket = self._buckets[client, kind] = Bucket(per_minute, now)
        bucket.fill(now)
        return bucket


@dataclass
class Bucket:
    """So much a minute, of which what is left unused for up to a minute may be taken at once."""

    per_minute: float
    filled: float
    level: float = field(init=False)

    def __post_init__(self) -> None:
        self.level = self.per_minute

    def fill(self, now: float) -> None:
        """Add what the time since the last time is worth."""
        passed, self.filled = now - self.filled, now
        self.level = min(self.per_minute, self.level + passed * self.per_minute / MINUTE)

    def wait_s(self, amount: float) -> float:
        """Seconds until there is ``amount``; infinite if it is more than there ever is."""
        if amount > self.per_minute:
            return float("inf")
        return max(0.0, amount - self.level) * MINUTE / self.per_minute

    def headers(self, kind: str) -> dict[str, str]:
        """Limit, what is left, and when it is full again."""
        return {
            f"x-ratelimit-limit-{kind}": f"{self.per_minute:g}",
            f"x-ratelimit-remaining-{kind}": f"{int(self.level)}",
            f"x-ratelimit-reset-{kind}": f"{self.wait_s(self.per_minute):.1f}s",
        }
