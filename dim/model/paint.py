"""Painting one batch: from its rows' noise through the sampler and the autoencoder to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from PIL import Image
from torch import Tensor

from dim.model import sampler
from dim.model.autoencoder import Autoencoder
from dim.model.config import Fit, SamplingConfig
from dim.model.painter import Painter
from dim.model.pixels import centre_crop, stretched, to_images, to_pixels
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
        sampling: ``steps``, ``shift`` and ``solver`` of it.
        source_latent: (B, C, h, w) for an edit.
        on_step: called after each step.

    Returns:
        One RGB image a row, of its final size.

    Raises:
        InputError: ``steps`` is below 1, or the solver is unknown.
    """
    device = painter.null_condition.device
    width, height = (side // autoencoder.factor for side in rows[0].size)
    shape = (painter.latent_channels, height, width)
    decoded = partial(_decoded, autoencoder, rows)
    latent = sampler.sample(
        painter,
        torch.stack([noise(row.seed, shape) for row in rows]).to(device),
        conditioning.condition,
        conditioning.mask,
        source_latent=source_latent,
        steps=sampling.steps,
        guidance_scale=[row.guidance_scale for row in rows],
        shift=sampling.shift,
        solver=sampling.solver,
        negative_condition=conditioning.negative,
        negative_mask=conditioning.negative_mask,
        on_step=on_step and _reporter(rows, sampling.steps, decoded, on_step),
    )
    return decoded(latent)


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
