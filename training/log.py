"""What a worker tells the world while it trains."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import suppress

import torch
import torch.distributed as dist
from PIL import Image

from infra.tracking import Run, TrackingError

SAID = "said"  # the tag that holds what was said last
_SAID_LINES = 20
_FLUSH_SECONDS = 2.0


class RunLog:
    """Rank 0's way to MLflow; on other ranks (``run`` is ``None``) it does nothing.

    The tracker was checked before the first step. Should it fail later, hours of training are
    worth more than its points: they are kept and sent again, and a line says so.
    """

    def __init__(self, run: Run | None) -> None:
        self._run = run
        self._rows: list[tuple[int, Mapping[str, float]]] = []
        self._lines: list[str] = []
        self._sent = time.monotonic()
        self._failing = False

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Note ``metrics`` at ``step``; they are sent every two seconds."""
        if self._run is None:
            return
        self._rows.append((step, dict(metrics)))
        if time.monotonic() - self._sent >= _FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Send what is kept."""
        if self._run is None or not self._rows:
            return
        self._sent = time.monotonic()
        try:
            self._run.log_metric_rows(self._rows)
        except TrackingError as error:
            if not self._failing:
                self.say(f"warning: {error}; training goes on, metrics are kept and sent later")
            self._failing = True
            return
        self._failing = False
        self._rows.clear()

    def say(self, text: str) -> None:
        """Lines for a human: in the worker's log, and (the latest ones) as the run's tag."""
        if self._run is None:
            return
        now = time.strftime("%H:%M:%S")
        self._lines += [f"{now} {line}" for line in text.splitlines()]
        del self._lines[:-_SAID_LINES]
        # Not print: Ray Train also turns that into a record of its own log, and shows both.
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()
        with suppress(TrackingError):
            self._run.set_tags({SAID: "\n".join(self._lines)})

    def picture(self, image: Image.Image, name: str) -> None:
        """Store an image as the run's artifact ``name``."""
        if self._run is None:
            return
        try:
            self._run.log_figure(image, name)
        except TrackingError as error:
            self.say(f"warning: {error}; training goes on without this picture")

    def close(self) -> None:
        """Send the rest.

        Raises:
            TrackingError: the tracker has not come back.
        """
        if self._run is not None and self._rows:
            self._run.log_metric_rows(self._rows)
            self._rows.clear()


class LossMeter:
    """Mean loss over all workers and throughput since the last reading."""

    def __init__(self, device: torch.device, global_batch: int) -> None:
        self._sum = torch.zeros((), device=device)
        self._steps = 0
        self._global_batch = global_batch
        self._started = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Count the loss of one step (this worker's mean)."""
        self._sum += loss
        self._steps += 1

    def read(self) -> dict[str, float]:
        """``loss`` and ``samples_per_second`` (over all workers), then start anew.

        Every worker calls this at the same step: the losses are averaged across them.
        """
        mean = self._sum / max(1, self._steps)
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        seconds = time.perf_counter() - self._started
        rate = self._steps * self._global_batch / max(seconds, 1e-9)
        self.restart()
        return {"loss": mean.item(), "samples_per_second": rate}

    def restart(self) -> None:
        """Forget, so that time spent on something else does not count."""
        self._sum.zero_()
        self._steps = 0
        self._started = time.perf_counter()
