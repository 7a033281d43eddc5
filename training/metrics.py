"""What a stage measures of its steps: losses, what a second comes to, and the line that says it.

Sums stay on the device, and those of all workers meet where a line is logged.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from dim.errors import ConfigError
from dim.gpus import Gpu, named_gpu
from dim.learning.config import RESERVED_NAME
from dim.model.config import ModelConfig
from dim.model.flow import QUARTILES, quartile_of
from training import parallel
from training.estimate import sample_flops
from training.log import RunLog
from training.plan import Plan
from training.stage import learning_rate_at

_SAY_SECONDS = 15.0
_RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes

PREFIX = "loss/"
"""How the metrics of parts of the loss begin."""


class StepLog:
    """The metrics of the steps, and now and then a line with the time that is left.

    Args:
        log: Where they go.
        plan: What the worker was told.
        model: What is trained.
        device: What the worker computes on.
        live: Whether the frozen parts run at every step.
    """

    def __init__(
        self, log: RunLog, plan: Plan, model: ModelConfig, device: torch.device, *, live: bool
    ) -> None:
        self._log = log
        self._plan = plan
        self._breakdown = Breakdown(plan.config.source_names, device)
        self._throughput = Throughput(plan, model, device, live=live)
        self._sum = torch.zeros((), device=device)
        self._norm = torch.zeros((), device=device)
        self.begin(0)

    def begin(self, done: int) -> None:
        """Say that the next step follows ``done`` others."""
        self._said = time.monotonic()
        self._written = done
        self.restart()

    def restart(self) -> None:
        """Forget what was added and how long it took."""
        self._sum.zero_()
        self._steps = self._counted = 0
        self._waited = 0.0
        self._breakdown.restart()
        self._throughput.restart()
        self._started = time.perf_counter()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is done inside takes none of the steps' time."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self._started += time.perf_counter() - began

    def add_pass(
        self,
        losses: torch.Tensor,
        counted: torch.Tensor,
        index: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor,
    ) -> None:
        """Count a forward pass of the step: ``mask`` (B, N) marks tokens, for others ``Breakdown``.

        Nothing here waits for the device.
        """
        self._breakdown.add(losses, counted, index, source)
        self._throughput.add(mask, counted)

    def add(
        self,
        loss: torch.Tensor,
        norm: torch.Tensor,
        *,
        skipped: bool = False,
        waited: float = 0.0,
    ) -> None:
        """Count one step: this worker's mean loss, and the norm of the gradient over all.

        The loss of a skipped one is left out, for it may be no number. ``waited`` are the seconds
        of it in which there was nothing to compute on.
        """
        self._steps += 1
        self._waited += waited
        self._norm = norm
        self._breakdown.end_step(skipped=skipped)
        if not skipped:
            self._sum += loss
            self._counted += 1

    def read(self, done: int) -> dict[str, float]:
        """Metrics of the steps since the last reading, ``done`` in all; then start anew.

        Every worker calls this at the same step: losses are averaged across them, and are no number
        if all updates were skipped. ``grad_norm`` is that of the last step,
        ``samples_per_second`` counts all workers. ``data_wait`` is the share of the time in which
        this worker waited for samples, ``memory_gb`` the most that it has held so far: of its GPU,
        or of the machine where it has none. ``loss/NAME`` is the mean loss of a source's samples,
        or of those of a quartile of the noise levels, where there were any; for tokens, ``mfu`` and
        dollars see ``Throughput.read``.
        """
        plan = self._plan
        loss = parallel.mean(self._sum / self._counted)  # 0 / 0 is nan
        seconds = time.perf_counter() - self._started
        samples, waited = self._steps * plan.config.batch_size, self._waited
        parts = self._breakdown.read()
        rates = self._throughput.read(samples, seconds)
        self.restart()
        return {
            "loss": loss.item(),
            **parts,
            "samples_per_second": samples / max(seconds, 1e-9),
            **rates,
            "learning_rate": learning_rate_at(plan.config, done - 1, plan.steps),
            "grad_norm": self._norm.item(),
            "data_wait": waited / max(seconds, 1e-9),
            "memory_gb": _most_memory(self._sum.device) / 1e9,
            "epoch": done / plan.steps_per_epoch,
            "progress": done / plan.steps,
        }

    def write(self, done: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` of step ``done``; say them every 15 seconds, and at the end."""
        self._log.add(done, metrics)
        self._log.count((done - self._written) * self._plan.config.batch_size, metrics)
        self._written = done
        now, plan = time.monotonic(), self._plan
        if now - self._said <= _SAY_SECONDS and done != plan.steps:
            return
        self._said = now
        rate = metrics["samples_per_second"]
        left = (plan.steps - done) / (rate / plan.config.batch_size) / 60
        self._log.say(
            f"{plan.config.stage} step {done}/{plan.steps}: loss {metrics['loss']:.4f}, "
            f"{rate:.0f} samples/s, {left:.1f} minutes left"
        )


def _most_memory(device: torch.device) -> float:
    """Bytes that this process has held at most, on its GPU or in the machine's memory."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT


class Breakdown:
    """Sums of the losses of a worker's samples, by source and by quartile of the noise levels.

    Args:
        sources: What the sources are called; of a single one there is no loss of its own.
        device: Where the losses are.
    """

    def __init__(self, sources: Sequence[str], device: torch.device) -> None:
        named = sources if len(sources) > 1 else ()
        self._names = [*named, *(f"{RESERVED_NAME}{number + 1}" for number in range(QUARTILES))]
        self._sources = len(named)
        self._step = torch.zeros(2, len(self._names), device=device)  # sums, and of how many
        self._sum = torch.zeros_like(self._step)

    def add(
        self,
        losses: torch.Tensor,
        counted: torch.Tensor,
        index: torch.Tensor,
        source: torch.Tensor,
    ) -> None:
        """Add the rows of a forward pass to the step.

        Args:
            losses: (B,) float32 on the device, one a row.
            counted: (B,) bool on the device: rows that are no repetitions.
            index: (B,) int64 on the CPU, the place of the row's noise level in the table.
            source: (B,) int64 on the CPU, the number of its source.
        """
        groups = [self._sources + quartile_of(index)]
        if self._sources:
            groups.append(source)
        kept = torch.stack([losses.detach().float() * counted, counted.float()])
        for group in groups:
            self._step.index_add_(1, group.to(self._step.device, non_blocking=True), kept)

    def end_step(self, *, skipped: bool) -> None:
        """Count the step; the losses of a ``skipped`` one are left out, for they may be none."""
        if not skipped:
            self._sum += self._step
        self._step.zero_()

    def read(self) -> dict[str, float]:
        """``loss/NAME`` of all workers since the last reading (a collective); then start anew.

        What had no sample is not there.
        """
        sums, counts = parallel.total(self._sum).tolist()
        self.restart()
        return {
            f"{PREFIX}{name}": total / count
            for name, total, count in zip(self._names, sums, counts, strict=True)
            if count
        }

    def restart(self) -> None:
        """Forget what was added."""
        self._sum.zero_()
        self._step.zero_()


class Throughput:
    """Counts condition tokens on the device, and reckons when a line is logged.

    Args:
        plan: What the worker was told.
        model: What is trained.
        device: What the worker computes on.
        live: Whether the frozen parts run at every step.
    """

    def __init__(self, plan: Plan, model: ModelConfig, device: torch.device, *, live: bool) -> None:
        self._plan = plan
        self._model = model
        self._live = live
        self._gpu = _gpu_at(device)
        self._tokens = torch.zeros((), device=device)
        self._flops: float | None = None  # of a sample; known when its tokens are

    def add(self, mask: torch.Tensor, counted: torch.Tensor) -> None:
        """Count a forward pass: ``mask`` (B, N) marks tokens, ``counted`` (B,) rows that count."""
        self._tokens += (mask & counted[:, None]).sum()

    def read(self, samples: int, seconds: float) -> dict[str, float]:
        """Metrics of ``samples`` of all workers in ``seconds`` (a collective); then start anew.

        ``tokens_per_second`` are those of the conditions; ``mfu`` is what the work of the model's
        forward and backward passes is of the GPUs' peak in bfloat16, where that is known: what is
        computed again for the sake of memory is no part of it. ``dollars_per_1000_samples`` is
        there where the stage has a price.
        """
        tokens = parallel.total(self._tokens).item()
        self.restart()
        seconds = max(seconds, 1e-9)
        found = {"tokens_per_second": tokens / seconds}
        workers = parallel.world_size()
        if self._gpu is not None and (flops := self._sample_flops(tokens / samples)):
            found["mfu"] = flops * samples / seconds / (workers * self._gpu.flops)
        price = self._plan.config.price_per_hour
        if price is not None:
            found["dollars_per_1000_samples"] = 1000 * price * workers * seconds / 3600 / samples
        return found

    def restart(self) -> None:
        """Forget what was counted."""
        self._tokens.zero_()

    def _sample_flops(self, tokens: float) -> float:
        """Of a sample with so many tokens, counted once; 0 where it cannot be."""
        if self._flops is None:
            try:
                self._flops = sample_flops(
                    self._plan.config, self._model, round(tokens), live=self._live
                )
            except ConfigError:  # the model's sizes are in its weights only
                self._flops = 0.0
        return self._flops


def _gpu_at(device: torch.device) -> Gpu | None:
    """The GPU that ``device`` is, if it is one of the table."""
    return named_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
