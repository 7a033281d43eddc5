"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import nn


class Ema:
    """Averages of ``module``'s trainable parameters, in float32 on the parameters' device.

    The decay starts low and grows to ``decay``, ``min(decay, (1 + n) / (10 + n))`` at update
    ``n``: otherwise a short run's average would still hold its random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters: list[torch.Tensor] = [parameter for _, parameter in named]
        self._averages = [p.detach().clone().float() for p in self._parameters]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters after update ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(self._averages, [p.detach() for p in self._parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module's parameters are the averages."""
        with torch.no_grad():
            trained = [p.detach().clone() for p in self._parameters]
            torch._foreach_copy_(self._parameters, self._averages)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._parameters, trained)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The averages by parameter name."""
        return dict(zip(self._names, self._averages, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take averages saved by ``state_dict``.

        Raises:
            KeyError: a parameter has no saved average.
        """
        for name, average in zip(self._names, self._averages, strict=True):
            average.copy_(state[name])


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """``ema.applied()``, or nothing where there is no EMA."""
    return nullcontext() if ema is None else ema.applied()
