"""The ingress's Prometheus metrics; those of the painter are with it."""

from __future__ import annotations

from ray.serve import metrics

from serving.account import Account

SECONDS = [0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]


class RequestMetrics:
    """Tagged as of Serve, by deployment, replica and application, and by route and status."""

    def __init__(self) -> None:
        by_route = ("route",)
        self._requests = metrics.Counter(
            "dim_requests",
            description="Requests that were answered, or whose client has gone (499).",
            tag_keys=("route", "status"),  # type: ignore[arg-type]  # Ray's says one key
        )
        self._seconds = metrics.Histogram(
            "dim_request_seconds",
            description="From a request's first byte to its answer's last, in seconds.",
            boundaries=SECONDS,
            tag_keys=by_route,
        )
        self._waited = metrics.Histogram(
            "dim_request_waited_seconds",
            description="How long the image of a request that waited longest did so for a painter.",
            boundaries=SECONDS,
            tag_keys=by_route,
        )
        self._images = metrics.Counter(
            "dim_images", description="Images that were let in.", tag_keys=by_route
        )
        self._work = metrics.Counter(
            "dim_megapixel_steps",
            description="Megapixels painted x steps, of what was let in.",
            tag_keys=by_route,
        )

    def request(self, route: str, status: int, seconds: float, account: Account) -> None:
        """Count a request that has ended."""
        tags = {"route": route}
        self._requests.inc(tags={**tags, "status": str(status)})
        self._seconds.observe(seconds, tags=tags)
        if account.images:
            self._waited.observe(account.waited_s, tags=tags)
            self._images.inc(account.images, tags=tags)
            self._work.inc(account.megapixel_steps, tags=tags)
