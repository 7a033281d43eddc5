"""Continuous batching: samples that begin and end at different steps share the network's passes.

A sample joins a batch between two steps and leaves it when it is finished, or is taken out. At each
step those of one latent shape pass the network together, whatever their steps, guidance and
conditions, and each becomes what ``sampler.sample`` makes of it alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dim.errors import InputError
from dim.model.config import Solver
from dim.model.painter import Painter, PreparedCondition, together
from dim.model.sampler import Condition, make_scheduler, prepare_branches
from dim.model.step_cache import StepCache

if TYPE_CHECKING:
    from dim.model.lora.rows import Adapters


class Denoising:
    """One latent on its way from noise to image; made by ``begin``.

    ``latent`` (1, C, h, w) is as noisy as the next step expects it, ``number`` of ``steps`` are
    done. ``adapter``: name of the one that it is painted with, if any. ``company``: how many at
    most passed the network together with it, itself among them.
    """

    def __init__(
        self,
        noise: Tensor,
        prepared: PreparedCondition,
        source_latent: Tensor | None,
        *,
        steps: int,
        guidance_scale: float,
        shift: float,
        solver: Solver,
        step_cache: float = 0.0,
        adapter: str | None = None,
    ) -> None:
        self.adapter = adapter
        self.cache = StepCache(step_cache) if step_cache else None
        self._step_cache = step_cache
        self.latent = noise
        self.prepared = prepared
        self.source_latent = source_latent
        self.steps = steps
        self.number = 0
        self.company = 0
        self._guidance_scale = guidance_scale
        # It remembers the step before, so that each latent has its own.
        self._scheduler = make_scheduler(solver, steps, shift)
        self._estimate = noise
        self._shift, self._solver = shift, solver

    def again(self, noise: Tensor) -> Denoising:
        """The same from the start with another ``noise``; nothing is prepared or copied."""
        return Denoising(
            noise,
            self.prepared,
            self.source_latent,
            steps=self.steps,
            guidance_scale=self._guidance_scale,
            shift=self._shift,
            solver=self._solver,
            step_cache=self._step_cache,
            adapter=self.adapter,
        )

    @property
    def done(self) -> bool:
        """Whether all steps are done."""
        return self.number == self.steps

    @property
    def timestep(self) -> Tensor:
        """What the network is told at the next step, one number."""
        return self._scheduler.timesteps[self.number]

    @property
    def estimate(self) -> Tensor:
        """The finished latent (1, C, h, w) as far as the network can tell by now."""
        return self._estimate

    def advance(self, velocity: Tensor) -> None:
        """Do a step by ``velocity`` (branches, C, h, w), what the network made of ``latent``."""
        if len(velocity) == 2:
            away, told = velocity.chunk(2)
            velocity = away + self._guidance_scale * (told - away)
        before, timestep = self.latent, self.timestep
        self.latent = self._scheduler.step(velocity, timestep, before, return_dict=False)[0]
        self._estimate = before - self._scheduler.sigmas[self.number].to(before) * velocity
        self.number += 1


@torch.no_grad()
def begin(
    painter: Painter,
    noise: Tensor,
    condition: Condition,
    *,
    negative: Condition | None = None,
    source_latent: Tensor | None = None,
    steps: int = 30,
    guidance_scale: float = 7.5,
    shift: float = 3.0,
    solver: Solver = "dpm",
    step_cache: float = 0.0,
    adapter: str | None = None,
) -> Denoising:
    """Prepare one sample: what no step changes is computed here, and held until it is finished.

    Args:
        painter: the velocity network.
        noise: (1, C, h, w), where sampling starts.
        condition: one row, (1, N, F).
        negative: one row, (1, M, F), to be guided away from instead of the null condition.
        source_latent: (1, C, h, w) for editing.
        steps, guidance_scale, shift, solver, step_cache: as ``sampler.sample`` takes them.
        adapter: of the batch's ``Adapters``, in whose ``using`` this is called.

    Raises:
        InputError: ``steps`` below 1, an unknown solver, shapes that do not fit, or a step cache
            beside an adapter.
    """
    if step_cache and adapter is not None:
        raise InputError("a step cache does not go with adapters by name: turn one of them off")
    prepared = prepare_branches(painter, condition, negative, guided=guidance_scale != 1)
    return Denoising(
        noise,
        prepared,
        source_latent,
        steps=steps,
        guidance_scale=guidance_scale,
        shift=shift,
        solver=solver,
        step_cache=step_cache,
        adapter=adapter,
    )


class ContinuousBatch:
    """The samples that one painter is working on. Not for several threads at once.

    Args:
        painter: the velocity network.
        adapters: that samples may have.
    """

    def __init__(self, painter: Painter, adapters: Adapters | None = None) -> None:
        self._painter = painter
        self._adapters = adapters
        self._rows: list[Denoising] = []
        # Where memory did not suffice: how many of a latent shape it may pass at once.
        self._most: dict[torch.Size, int] = {}

    @property
    def rows(self) -> tuple[Denoising, ...]:
        """The samples in the batch, the longest there first."""
        return tuple(self._rows)

    def join(self, row: Denoising) -> None:
        """Take ``row`` into the next step."""
        self._rows.append(row)

    def leave(self, row: Denoising) -> None:
        """Take ``row`` out again, finished or not."""
        self._rows.remove(row)

    @torch.no_grad()
    def step(self) -> dict[Denoising, Exception]:
        """Do one step of every sample that is not done; those of one latent shape pass together.

        Where a pass fails its samples are divided and each half passes by itself, so that in the
        end only those fail that fail alone, and a shape whose passes need more memory than there
        is goes on in smaller ones.

        Returns:
            What failed, and why. It did no step and is still in the batch.
        """
        waiting: dict[torch.Size, list[Denoising]] = {}
        for row in self._rows:
            if not row.done:
                waiting.setdefault(row.latent.shape, []).append(row)
        self._most = {shape: most for shape, most in self._most.items() if shape in waiting}
        failed: dict[Denoising, Exception] = {}
        for shape, rows in waiting.items():
            most = self._most.get(shape, len(rows))
            for start in range(0, len(rows), most):
                failed |= self._advance(rows[start : start + most])
        return failed

    def _advance(self, rows: Sequence[Denoising]) -> dict[Denoising, Exception]:
        try:
            velocities = self._velocities(rows)
        except Exception as error:
            if len(rows) == 1:
                return {rows[0]: error}
            half = (len(rows) + 1) // 2
            if isinstance(error, torch.OutOfMemoryError):
                self._most[rows[0].latent.shape] = half
        else:
            return _advanced(rows, velocities)
        # Not while the error is handled: it holds on to the pass that failed, and to its memory.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._advance(rows[:half]) | self._advance(rows[half:])

    def _velocities(self, rows: Sequence[Denoising]) -> Sequence[Tensor]:
        """The velocity (branches, C, h, w) of each of ``rows``, from one pass of the network."""
        branches = [row.prepared.rows for row in rows]
        with (
            nullcontext()
            if self._adapters is None
            else self._adapters.rows([row.adapter for row in rows], branches)
        ):
            velocity = self._painter(
                torch.cat([row.latent for row in rows]),
                torch.stack([row.timestep for row in rows]),
                together([row.prepared for row in rows]),
                source_latent=self._sources(rows),
                caches=_caches(rows),
            )
        return velocity.split(branches)

    def _sources(self, rows: Sequence[Denoising]) -> Tensor | None:
        """Source latents (B, C, h, w), zeros where a sample has none; None where none has one."""
        given = [row.source_latent for row in rows]
        if all(source is None for source in given):
            return None
        return torch.cat(
            [
                torch.zeros_like(row.latent) if source is None else source
                for row, source in zip(rows, given, strict=True)
            ]
        )


def _caches(rows: Sequence[Denoising]) -> list[StepCache] | None:
    """One a row; one without a step cache gets an empty one, which computes everything."""
    if all(row.cache is None for row in rows):
        return None
    return [row.cache or StepCache(0.0) for row in rows]


def _advanced(
    rows: Sequence[Denoising], velocities: Sequence[Tensor]
) -> dict[Denoising, Exception]:
    """Do each row's step; what failed, and why."""
    failed: dict[Denoising, Exception] = {}
    for row, velocity in zip(rows, velocities, strict=True):
        row.company = max(row.company, len(rows))
        try:
            row.advance(velocity)
        except Exception as error:
            failed[row] = error
    return failed
