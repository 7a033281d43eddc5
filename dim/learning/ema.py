"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


class Ema:
    """Averages of ``module``'s trainable parameters, in float32.

    Of a sharded parameter every worker averages its own part. ``device`` is where the averages
    are kept: the parameters' by default; the CPU spares a GPU their memory and costs a copy of the
    weights at each update.

    The decay starts low and grows to ``decay``, ``min(decay, (1 + n) / (10 + n))`` at update
    ``n``: otherwise a short run's average would still hold its random start.
    """

    def __init__(self, module: nn.Module, decay: float, device: str | None = None) -> None:
        self.decay = decay
        named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
        self._names = [name for name, _ in named]
        self._parameters: list[Tensor] = [parameter for _, parameter in named]
        self._averages = [p.detach().clone().float() for p in self._parameters]
        if device is not None:
            self._averages = [average.to(device) for average in self._averages]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the averages towards the parameters after update ``step`` (from 0)."""
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = _parts(self._averages)
        weights = [
            weight.to(average.device)
            for weight, average in zip(_parts(self._parameters), averages, strict=True)
        ]
        torch._foreach_lerp_(averages, weights, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the module's parameters are the averages."""
        with torch.no_grad():
            parameters = _parts(self._parameters)
            trained = [p.clone() for p in parameters]
            torch._foreach_copy_(parameters, _parts(self._averages))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(_parts(self._parameters), trained)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name; not copies, so what is read into them is taken."""
        return dict(zip(self._names, self._averages, strict=True))


def averaged(ema: Ema | None) -> AbstractContextManager[None]:
    """``ema.applied()``, or nothing where there is no EMA."""
    return nullcontext() if ema is None else ema.applied()


def _parts(tensors: list[Tensor]) -> list[Tensor]:
    """What this worker holds of them; of a whole tensor all. Without gradients these are views."""
    return [
        (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
        for tensor in tensors
    ]
