"""The random numbers of a step: a pure function of seed, step and slot.

Nothing is drawn from a running generator, so there is no generator state to save: an interrupted
run, a run with another number of workers and the undisturbed run draw the same numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from dim.model.flow import LEVELS


@dataclass(frozen=True)
class Draws:
    """What one step draws for ``B`` rows.

    ``noise`` (B, C, h, w) float32 from N(0, 1); ``index`` (B,) int64, the place in the table of
    sigmas; ``dropped`` (B,) bool, rows whose condition is replaced by the null condition;
    ``choice`` (B,) float64 in [0, 1), which of the mixed texts.
    """

    noise: torch.Tensor
    index: torch.Tensor
    dropped: torch.Tensor
    choice: np.ndarray


def draw(
    seed: int,
    step: int,
    slots: Sequence[int],
    shape: tuple[int, int, int],
    *,
    dropout: float,
) -> Draws:
    """Draw for the rows of one worker.

    The noise level is floor(1000 · sigmoid(z)), z ~ N(0, 1): the paper's logit-normal sampling.
    """
    generator = torch.Generator()
    noise, scalars = [], []
    for slot in slots:
        entropy = np.random.SeedSequence([seed, step, slot]).generate_state(1, np.uint64)[0]
        generator.manual_seed(int(entropy >> np.uint64(1)))
        noise.append(torch.randn(shape, generator=generator))
        scalars.append(
            torch.cat([torch.randn(1, generator=generator), torch.rand(2, generator=generator)])
        )
    level, drop, choice = torch.stack(scalars).unbind(1)
    index = (torch.sigmoid(level) * LEVELS).long().clamp_(max=LEVELS - 1)
    return Draws(torch.stack(noise), index, drop < dropout, choice.double().numpy())
