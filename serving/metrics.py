"""The ingress's Prometheus metrics; those of the painter are with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram
from ray.serve import metrics

from serving.account import Account

SECONDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]


Count = Callable[[float, Mapping[str, str]], None]
"""Counts a value, with tags."""


class RequestMetrics:
    """Tagged as of Serve, by deployment, replica and application, and by route and status.

    Attributes:
        own: what this process counts, by the same names as Ray's agents show it.
    """

    def __init__(self) -> None:
        self.own = CollectorRegistry()
        self._requests = self._counter(
            "dim_requests", "Requests that were answered, or whose client has gone (499).", "status"
        )
        self._seconds = self._histogram(
            "dim_request_seconds",
            "From a request's first byte to its answer's last, in seconds.",
        )
        self._waited = self._histogram(
            "dim_request_waited_seconds",
            "How long the image of a request that waited longest did so for a painter.",
        )
        self._images = self._counter("dim_images", "Images that were let in.")
        self._work = self._counter(
            "dim_megapixel_steps", "Megapixels painted x steps, of what was let in."
        )

    def request(self, route: str, status: int, seconds: float, account: Account) -> None:
        """Count a request that has ended."""
        tags = {"route": route}
        self._requests(1, {**tags, "status": str(status)})
        self._seconds(seconds, tags)
        if account.images:
            self._waited(account.waited_s, tags)
            self._images(account.images, tags)
            self._work(account.megapixel_steps, tags)

    def _counter(self, name: str, said: str, *tags: str) -> Count:
        keys = ("route", *tags)
        theirs = metrics.Counter(name, said, keys)  # type: ignore[arg-type]  # Ray's says one key
        ours = Counter(f"ray_{name}", said, keys, registry=self.own)

        def count(value: float, tags: Mapping[str, str]) -> None:
            theirs.inc(value, tags=dict(tags))
            ours.labels(**tags).inc(value)

        return count

    def _histogram(self, name: str, said: str) -> Count:
        keys = ("route",)
        theirs = metrics.Histogram(name, said, boundaries=SECONDS, tag_keys=keys)
        ours = Histogram(f"ray_{name}", said, keys, registry=self.own, buckets=SECONDS)

        def count(value: float, tags: Mapping[str, str]) -> None:
            theirs.observe(value, tags=dict(tags))
            ours.labels(**tags).observe(value)

        return count
