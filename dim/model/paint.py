"""From a row's noise through the sampler and the autoencoder to its image: in a batch, or coming
and going among others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from dim.model import continuous, sampler
from dim.model.autoencoder import Autoencoder
from dim.model.config import Fit, SamplingConfig
from dim.model.framing import centre_crop, stretched
from dim.model.painter import Painter
from dim.model.pixels import to_images, to_pixels
from dim.model.request import Conditioning, OnStep, Progress, Row


def paint(
    painter: Painter,
    autoencoder: Autoencoder,
    rows: Sequence[Row],
    conditioning: Conditioning,
    sampling: SamplingConfig,
    *,
    source_latent: Tensor | None = None,
    on_step: OnStep | None = None,
) -> list[Image.Image]:
    """Images of ``rows``, which are all painted at one size.

    Args:
        painter, autoencoder: on one device.
        rows: their noise is drawn from their own seeds.
        conditioning: one row each.
        sampling: ``steps``, ``shift``, ``solver`` and ``step_cache`` of it.
        source_latent: (B, C, h, w) for an edit.
        on_step: called after each step.

    Returns:
        One RGB image a row, of its final size.

    Raises:
        InputError: ``steps`` is below 1, or the solver is unknown.
    """
    decoded = partial(_decoded, autoencoder, rows)
    latent = sampler.sample(
        painter,
        _noises(painter, autoencoder, rows),
        conditioning.condition,
        conditioning.mask,
        source_latent=source_latent,
        steps=sampling.steps,
        guidance_scale=[row.guidance_scale for row in rows],
        shift=sampling.shift,
        solver=sampling.solver,
        negative_condition=conditioning.negative,
        negative_mask=conditioning.negative_mask,
        step_cache=sampling.step_cache,
        on_step=on_step and _reporter(rows, sampling.steps, decoded, on_step),
    )
    return decoded(latent)


@dataclass(frozen=True, eq=False)
class Painting:
    """One image that is painted in the company of others; see ``dim.model.continuous``.

    ``row``: what was asked for. ``denoising``: its latent, to join a ``ContinuousBatch``.
    """

    row: Row
    denoising: continuous.Denoising
    autoencoder: Autoencoder

    def again(self, seed: int) -> Painting:
        """The same from the start with another seed; texts and source are not encoded again."""
        fresh = noise(seed, tuple(self.denoising.latent.shape[1:]))[None]
        denoising = self.denoising.again(fresh.to(self.denoising.latent.device))
        return replace(self, row=replace(self.row, seed=seed), denoising=denoising)

    def preview(self) -> Image.Image:
        """The image as the painter sees it finished by now, RGB and of its final size."""
        return _decoded(self.autoencoder, [self.row], self.denoising.estimate)[0]

    def image(self) -> Image.Image:
        """The image, RGB and of its final size, when all steps are done."""
        return _decoded(self.autoencoder, [self.row], self.denoising.latent)[0]


def begin(
    painter: Painter,
    autoencoder: Autoencoder,
    row: Row,
    conditioning: Conditioning,
    sampling: SamplingConfig,
    *,
    source_latent: Tensor | None = None,
    adapter: str | None = None,
) -> Painting:
    """What ``paint`` does before its first step, for one row; arguments and errors as there.

    ``adapter``: as of ``continuous.begin``.
    """
    negative = None
    if conditioning.negative is not None:
        negative = sampler.Condition(conditioning.negative, conditioning.negative_mask)
    denoising = continuous.begin(
        painter,
        _noises(painter, autoencoder, [row]),
        sampler.Condition(conditioning.condition, conditioning.mask),
        negative=negative,
        source_latent=source_latent,
        steps=sampling.steps,
        guidance_scale=row.guidance_scale,
        shift=sampling.shift,
        solver=sampling.solver,
        step_cache=sampling.step_cache,
        adapter=adapter,
    )
    return Painting(row, denoising, autoencoder)


def encode_sources(autoencoder: Autoencoder, rows: Sequence[Row], fit: Fit) -> Tensor:
    """Source latents (B, C, h, w) in float32 of ``rows``, which are all painted at one size."""
    fitted = [
        centre_crop(row.image, row.size) if fit == "square" else stretched(row.image, row.size)
        for row in rows
        if row.image is not None
    ]
    return autoencoder.encode(to_pixels(fitted)).float()


def noise(seed: int, shape: tuple[int, ...]) -> Tensor:
    """A sample's own noise, the same on every device and beside any neighbours."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _noises(painter: Painter, autoencoder: Autoencoder, rows: Sequence[Row]) -> Tensor:
    """(B, C, h, w) on the painter's device, of ``rows`` of one size."""
    width, height = (side // autoencoder.factor for side in rows[0].size)
    shape = (painter.latent_channels, height, width)
    noises = torch.stack([noise(row.seed, shape) for row in rows])
    return noises.to(painter.null_condition.device)


def _decoded(autoencoder: Autoencoder, rows: Sequence[Row], latent: Tensor) -> list[Image.Image]:
    images = to_images(autoencoder.decode(latent))
    return [stretched(image, row.final_size) for image, row in zip(images, rows, strict=True)]


def _reporter(
    rows: Sequence[Row],
    steps: int,
    decoded: Callable[[Tensor], list[Image.Image]],
    on_step: OnStep,
) -> Callable[[sampler.Step], None]:
    numbers = tuple(row.number for row in rows)

    def report(step: sampler.Step) -> None:
        on_step(Progress(numbers, step.number + 1, steps, partial(decoded, step.estimate)))

    return report
