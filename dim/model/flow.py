"""Flow matching: the table of noise levels, noising, and the training loss."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dim.errors import InputError
from dim.model.painter import Painter

LEVELS = 1000
QUARTILES = 4
_EDGES = torch.tensor([338, 500, 662])  # 1000 · sigmoid of the quartiles of N(0, 1)


class FlowSchedule:
    """The published table of 1000 noise levels: linear in time, then shifted towards noise.

    ``sigmas``: float64 (1000,), 0 = image, just below 1 = noise, σ' = s·σ / (1 + (s−1)·σ).
    ``timesteps``: float64 (1000,), ``1000·sigmas``, what the network is told.
    """

    def __init__(self, shift: float = 3.0) -> None:
        # The detour over 1 − σ gives the very doubles of the published table. It matters:
        # timesteps lose their fraction later, and 249.999… and 250.0 then are different inputs.
        linear = 1.0 - np.linspace(1.0, 1.0 / LEVELS, LEVELS)
        sigmas = shift * linear / (1 + (shift - 1) * linear)
        self.shift = shift
        self.sigmas = torch.from_numpy(sigmas)
        self.timesteps = torch.from_numpy(sigmas * LEVELS)

    def add_noise(self, x0: Tensor, noise: Tensor, index: Tensor) -> Tensor:
        """x_t = (1 − σ)·x0 + σ·noise with σ of each row's ``index`` (B,); shape and type of x0."""
        sigma = self.sigmas[_checked(index, len(x0))].view(-1, *[1] * (x0.ndim - 1))
        keep, add = (1 - sigma).to(x0), sigma.to(x0)
        return keep * x0 + add * noise


def noise_levels(normal: Tensor) -> Tensor:
    """Places (B,) int64 in the table to train on, of numbers (B,) drawn from N(0, 1).

    The paper's logit-normal sampling: floor(1000 · sigmoid(z)).
    """
    return (torch.sigmoid(normal) * LEVELS).long().clamp(max=LEVELS - 1)


def quartile_of(index: Tensor) -> Tensor:
    """In which quarter, 0 to 3, of all draws of ``noise_levels`` each place ``index`` (B,) lies.

    Places 0-337, 338-499, 500-661 and 662-999, from least to most noise; under a table's shift s
    their noise levels end at s·u / (1 + (s-1)·u) with u = 0.338, 0.5, 0.662 and 1.
    """
    return torch.bucketize(index, _EDGES.to(index.device), right=True)


def loss(
    painter: Painter,
    x0: Tensor,
    noise: Tensor,
    index: Tensor,
    condition: Tensor,
    mask: Tensor | None,
    *,
    source_latent: Tensor | None = None,
    weight: Tensor | None = None,
    schedule: FlowSchedule | None = None,
) -> Tensor:
    """Mean squared error of the painter's velocity against noise − x0.

    Args:
        painter: called as ``painter(x_t, timestep, condition, mask, source_latent)``; a wrapped
            painter (DDP, FSDP) will do.
        x0: target latents (B, C, h, w); ``noise`` alike.
        index: places in the table (B,), see ``noise_levels``.
        condition, mask, source_latent: as ``Painter`` takes them.
        weight: (B, 1, h, w) importance of each cell; the row's loss is then the weighted mean.
        schedule: default shift 3, as published.

    Returns:
        float32 (B,), one loss a row.
    """
    schedule = schedule or FlowSchedule()
    index = _checked(index, len(x0))
    velocity = painter(
        schedule.add_noise(x0, noise, index),
        schedule.timesteps[index],
        condition,
        mask,
        source_latent,
    )
    return squared_error(velocity, noise - x0, weight)


def squared_error(velocity: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over each row (B, C, h, w), float32 (B,); ``weight`` as for ``loss``."""
    error = (velocity.float() - target.float()).square()
    if weight is None:
        return error.mean(dim=(1, 2, 3))
    weight = weight.to(error).expand_as(error)
    return (weight * error).sum(dim=(1, 2, 3)) / weight.sum(dim=(1, 2, 3))


def _checked(index: Tensor, rows: int) -> Tensor:
    index = index.detach().cpu().long()
    if index.shape != (rows,) or index.min() < 0 or index.max() >= LEVELS:
        raise InputError(f"the index must hold {rows} numbers from 0 to {LEVELS - 1}, not {index}")
    return index
