"""The sampler: from noise to a latent with DPM-Solver++ and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from diffusers import DPMSolverMultistepScheduler
from torch import Tensor

from dim.errors import InputError
from dim.model.painter import Painter


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
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Denoise a batch with DPM-Solver++ (multistep, order 2), as published.

    Args:
        painter: the velocity network.
        noise: (B, C, h, w), where sampling starts.
        condition: (B, N, F), right-padded; ``mask`` (B, N) marks what counts.
        source_latent: (B, C, h, w) for editing.
        steps: network evaluations.
        guidance_scale: how far to go from the unconditional velocity past the conditional one, one
            number or one a row. Where all are 1 the unconditional branch is not computed.
        shift: the time shift of the noise levels.
        on_step: called after each step with its number (from 0) and the current latent.

    Returns:
        The latent (B, C, h, w) in the type of ``noise``. A row does not depend on its neighbours.

    Raises:
        InputError: ``steps`` below 1, or guidance scales that do not fit the batch.
    """
    scale = _guidance(guidance_scale, noise)
    guided = bool((scale != 1).any())
    if guided:
        condition, mask, source_latent = _with_null_branch(painter, condition, mask, source_latent)
    prepared = painter.prepare(condition, mask)
    scheduler = _scheduler(steps, shift)
    latent = noise
    for step, timestep in enumerate(scheduler.timesteps):
        both = torch.cat([latent, latent]) if guided else latent
        velocity = painter(both, timestep, prepared, source_latent=source_latent)
        if guided:
            null, told = velocity.chunk(2)
            velocity = null + scale * (told - null)
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
        if on_step is not None:
            on_step(step, latent)
    return latent


def _scheduler(steps: int, shift: float) -> DPMSolverMultistepScheduler:
    if steps < 1:
        raise InputError(f"sampling takes at least 1 step, not {steps}")
    scheduler = DPMSolverMultistepScheduler(
        solver_order=2,
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=shift,
    )
    scheduler.set_timesteps(steps)
    return scheduler


def _guidance(scale: float | Sequence[float] | Tensor, noise: Tensor) -> Tensor:
    scales = torch.as_tensor(scale, dtype=noise.dtype, device=noise.device).flatten()
    if len(scales) not in (1, len(noise)):
        raise InputError(f"{len(scales)} guidance scales were given for {len(noise)} samples")
    return scales.view(-1, 1, 1, 1)


def _with_null_branch(
    painter: Painter, condition: Tensor, mask: Tensor | None, source_latent: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Both branches as one batch, unconditional rows first; one mask serves both."""
    null = painter.null(condition.shape[1]).to(condition).expand_as(condition)
    return (
        torch.cat([null, condition]),
        None if mask is None else torch.cat([mask, mask]),
        None if source_latent is None else torch.cat([source_latent, source_latent]),
    )
