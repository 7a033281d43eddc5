"""What a second of the workers comes to: tokens, the share of the GPUs' peak, dollars."""

from __future__ import annotations

import torch

from dim.errors import ConfigError
from dim.gpus import Gpu, named_gpu
from dim.model.config import ModelConfig
from training import parallel
from training.estimate import sample_flops
from training.plan import Plan


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
