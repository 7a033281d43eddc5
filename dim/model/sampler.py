"""The sampler: from noise to a latent, by DPM-Solver++ or Euler, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional

from dim.errors import InputError
from dim.model.config import Solver, require_choice
from dim.model.painter import Painter, PreparedCondition
from dim.model.step_cache import StepCache


@dataclass(frozen=True)
class Step:
    """Where sampling stands after a step.

    ``number`` counts from 0; ``latent`` (B, C, h, w) is as noisy as the next step expects it;
    ``estimate`` (B, C, h, w) is the finished latent as far as the network can tell by now.
    """

    number: int
    latent: Tensor
    estimate: Tensor


@torch.no_grad()
def sample(
    painter: Painter,
    noise: Tensor,
    condition: Tensor,
    mask: Tensor | None,
    *,
    source_latent: Tensor | None = None,
    steps: int = 30,
    guidance_scale: float | Sequence[float] | Tensor = 7.5,
    shift: float = 3.0,
    solver: Solver = "dpm",
    negative_condition: Tensor | None = None,
    negative_mask: Tensor | None = None,
    step_cache: float = 0.0,
    on_step: Callable[[Step], None] | None = None,
) -> Tensor:
    """Denoise a batch.

    Args:
        painter: the velocity network.
        noise: (B, C, h, w), where sampling starts.
        condition: (B, N, F), right-padded; ``mask`` (B, N) marks what counts.
        source_latent: (B, C, h, w) for editing.
        steps: network evaluations.
        guidance_scale: how far to go from the unconditional velocity past the conditional one, one
            number or one a row. Where all are 1 the unconditional branch is not computed.
        shift: the time shift of the noise levels.
        solver: ``"dpm"``, DPM-Solver++ (multistep, order 2), as published, or ``"euler"``, flow
            matching's straight steps.
        negative_condition: (B, M, F), to be guided away from instead of the null condition.
        negative_mask: (B, M) marks what of it counts, None all; a row without a mark has no
            negative condition and keeps the null condition.
        step_cache: the threshold of ``dim.model.step_cache``; 0 computes every step whole.
        on_step: called after each step. What it raises ends the sampling.

    Returns:
        The latent (B, C, h, w) in the type of ``noise``. A row does not depend on its neighbours.

    Raises:
        InputError: ``steps`` below 1, an unknown solver, or shapes that do not fit the batch.
    """
    scheduler = make_scheduler(solver, steps, shift)
    scale = _guidance(guidance_scale, noise)
    guided = bool((scale != 1).any())
    negative = None if negative_condition is None else Condition(negative_condition, negative_mask)
    prepared = prepare_branches(painter, Condition(condition, mask), negative, guided)
    caches = [StepCache(step_cache) for _ in noise] if step_cache else None
    latent = noise
    for number, timestep in enumerate(scheduler.timesteps):
        velocity = painter(latent, timestep, prepared, source_latent=source_latent, caches=caches)
        if guided:
            null, told = velocity.chunk(2)
            velocity = null + scale * (told - null)
        before, latent = latent, scheduler.step(velocity, timestep, latent, return_dict=False)[0]
        if on_step is not None:
            estimate = before - scheduler.sigmas[number].to(before) * velocity
            on_step(Step(number, latent, estimate))
    return latent


@dataclass(frozen=True)
class Condition:
    """Tokens (B, N, F) and which of them count, (B, N) or None for all."""

    tokens: Tensor
    mask: Tensor | None

    def padded(self, length: int) -> tuple[Tensor, Tensor]:
        """Tokens (B, length, F) and an explicit bool mask (B, length)."""
        missing = length - self.tokens.shape[1]
        mask = self.mask
        if mask is None:
            mask = self.tokens.new_ones(self.tokens.shape[:2], dtype=torch.bool)
        return (
            functional.pad(self.tokens, (0, 0, 0, missing)),
            functional.pad(mask.bool(), (0, missing)),
        )


def prepare_branches(
    painter: Painter, condition: Condition, negative: Condition | None, guided: bool
) -> PreparedCondition:
    """Both branches as one batch, the one to go away from first; without guidance only one.

    Raises:
        InputError: there are not as many negative conditions as conditions.
    """
    tokens, mask = condition.tokens, condition.mask
    if not guided:
        return painter.prepare(tokens, mask, branches=1)
    null = painter.null(tokens.shape[1]).to(tokens).expand_as(tokens)
    if negative is not None:
        away, away_mask = _instead(Condition(null, mask), negative)
        tokens, told = condition.padded(away.shape[1])
        return painter.prepare(torch.cat([away, tokens]), torch.cat([away_mask, told]), branches=2)
    # One mask serves both: the null condition has as many tokens as the condition.
    both = None if mask is None else torch.cat([mask, mask])
    return painter.prepare(torch.cat([null, tokens]), both, branches=2)


def _instead(null: Condition, negative: Condition) -> tuple[Tensor, Tensor]:
    """The rows of ``negative`` that have a mark, elsewhere those of ``null``."""
    if len(negative.tokens) != len(null.tokens):
        raise InputError(
            f"{len(negative.tokens)} negative conditions were given for {len(null.tokens)} samples"
        )
    length = max(null.tokens.shape[1], negative.tokens.shape[1])
    null_tokens, null_mask = null.padded(length)
    tokens, mask = negative.padded(length)
    given = mask.any(dim=1, keepdim=True)
    return (
        torch.where(given[:, :, None], tokens.to(null_tokens), null_tokens),
        torch.where(given, mask, null_mask),
    )


def make_scheduler(solver: Solver, steps: int, shift: float) -> Any:
    """diffusers' scheduler for one sample, or for a batch that goes through its steps together.

    Raises:
        InputError: ``steps`` below 1, or an unknown solver.
    """
    if steps < 1:
        raise InputError(f"sampling takes at least 1 step, not {steps}")
    require_choice("solver", solver, Solver)
    scheduler: Any
    if solver == "euler":
        scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    else:
        scheduler = DPMSolverMultistepScheduler(
            solver_order=2,
            algorithm_type="dpmsolver++",
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=shift,
        )
    scheduler.set_timesteps(steps)
    # Of many steps the first have one timestep after rounding, by which it would skip one of them.
    scheduler.set_begin_index(0)
    return scheduler


def _guidance(scale: float | Sequence[float] | Tensor, noise: Tensor) -> Tensor:
    scales = torch.as_tensor(scale, dtype=noise.dtype, device=noise.device).flatten()
    if len(scales) not in (1, len(noise)):
        raise InputError(f"{len(scales)} guidance scales were given for {len(noise)} samples")
    return scales.view(-1, 1, 1, 1)
