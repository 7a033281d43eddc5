"""What the trainings of the tiny models share: determinism, optimizer, log."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from dim.errors import DimError
from dim.tiny.config import PartConfig

Progress = Callable[[str, int, int, float], None]


def seeded(seed: int) -> None:
    """One thread and one seed: the same build on the same machine and versions, bit for bit."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True)


class Trainer:
    """AdamW with warm-up and cosine, clipped gradients, and one JSON line of log per interval."""

    def __init__(
        self, name: str, modules: list[nn.Module], part: PartConfig, log: Path, progress: Progress
    ) -> None:
        self.name, self.part, self.log, self.progress = name, part, log, progress
        self.parameters = [p for m in modules for p in m.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters,
            lr=part.learning_rate,
            betas=(0.9, 0.98),
            weight_decay=part.weight_decay,
            foreach=True,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)
        self._sum, self._count, self._step, self._start = 0.0, 0, 0, time.monotonic()
        log.unlink(missing_ok=True)

    def update(self, loss: Tensor) -> None:
        """One optimizer step; raises ``DimError`` when the loss is no number."""
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.part.grad_clip, foreach=True)
        self.optimizer.step()
        self.scheduler.step()
        self._record(loss.item())

    def _rate(self, step: int) -> float:
        if step < self.part.warmup_steps:
            return (step + 1) / self.part.warmup_steps
        left = self.part.steps - self.part.warmup_steps
        share = torch.tensor((step - self.part.warmup_steps) / max(1, left) * torch.pi)
        return 0.01 + 0.99 * 0.5 * (1 + float(torch.cos(share)))

    def _record(self, loss: float) -> None:
        self._step += 1
        if loss != loss:
            raise DimError(f"{self.name}: the loss is not a number at step {self._step}")
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._step % 100 and self._step != self.part.steps:
            return
        mean = self._sum / self._count
        self.progress(self.name, self._step, self.part.steps, mean)
        line = {
            "step": self._step,
            "loss": round(mean, 5),
            "learning_rate": float(f"{self.optimizer.param_groups[0]['lr']:.3g}"),
            "seconds": round(time.monotonic() - self._start, 1),
        }
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        self._sum, self._count = 0.0, 0
