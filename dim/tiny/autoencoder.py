"""The tiny DC-AE, trained to give tabletop images back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from diffusers import AutoencoderDC
from torch import Tensor

from dim import tabletop
from dim.model.autoencoder import Autoencoder
from dim.model.config import AutoencoderConfig
from dim.model.pixels import to_images, to_pixels
from dim.tabletop import STYLES
from dim.tiny.config import TinyBuildConfig
from dim.tiny.corpus import edit
from dim.tiny.schedule import Progress, Trainer, seeded

# A pixel belongs to a thing when any channel differs this much from the bare table, of 2.
_COVERED = 0.1
_BESIDE = 3


def train_autoencoder(
    config: TinyBuildConfig, model: AutoencoderConfig, out: Path, progress: Progress
) -> AutoencoderDC:
    """Train from nothing; the log goes to ``out/autoencoder.jsonl``.

    The loss is absolute plus squared error of pixels. Those near things are weighted: most of an
    image is bare table, and an autoencoder that gives only that back is nearly right on average.
    Noise on the latents makes the decoder forgive a painter's small mistakes, and every latent
    channel is pulled to unit scale, which a flow that starts from unit noise needs.
    """
    part = config.autoencoder
    seeded(config.seed)
    network = AutoencoderDC(**model.architecture).train()
    trainer = Trainer("autoencoder", [network], part, out / "autoencoder.jsonl", progress)
    for step in range(part.steps):
        pixels, weight = _batch(config, step)
        latent = network.encode(pixels, return_dict=False)[0]
        strength = torch.rand(len(latent), 1, 1, 1) * part.latent_noise
        restored = network.decode(latent + strength * torch.randn_like(latent), return_dict=False)[
            0
        ]
        error = restored - pixels
        loss = (weight * (error.abs() + error.square())).sum() / (3 * weight.sum())
        trainer.update(loss + part.latent_scale_weight * _off_scale(latent))
    return network.eval()


def reconstruction_accuracy(config: TinyBuildConfig, network: AutoencoderDC) -> dict[str, float]:
    """Share of held-out images that the checker reads rightly after encoding and decoding.

    ``reconstruction_strict`` asks :func:`dim.tabletop.exact_strictly`, and that nothing changed.
    """
    scenes = [edit(config, "evaluation", i).target for i in range(config.evaluate)]
    images = [tabletop.render(scene, config.resolution) for scene in scenes]
    autoencoder = Autoencoder(network)
    restored = to_images(autoencoder.decode(autoencoder.encode(to_pixels(images))))
    judged = [tabletop.judge(i, s, s) for i, s in zip(restored, scenes, strict=True)]
    return {
        "reconstruction": sum(one.exact for one in judged) / len(judged),
        "reconstruction_strict": sum(one.strict for one in judged) / len(judged),
    }


def _batch(config: TinyBuildConfig, step: int) -> tuple[Tensor, Tensor]:
    """Sources and targets of edits: pixels (B, 3, H, W) in [-1, 1] and weights (B, 1, H, W).

    Every other pair is drawn as outlines, which are the harder half: their holes are two pixels
    wide. A pixel on or beside a thing weighs ``thing_weight``, any other 1.
    """
    size = config.autoencoder.batch_size
    scenes = []
    for i in range(size // 2 + size % 2):
        sample = edit(config, "autoencoder", step * size + i)
        scenes += [sample.source, sample.target]
    scenes = [replace(s, style=STYLES[i // 2 % 2]) for i, s in enumerate(scenes[:size])]
    pixels = to_pixels([tabletop.render(scene, config.resolution) for scene in scenes])
    bare = [replace(scene, objects=()) for scene in scenes]
    empty = to_pixels([tabletop.render(scene, config.resolution) for scene in bare])
    covered = ((pixels - empty).abs().amax(1, keepdim=True) > _COVERED).float()
    # The table beside a thing counts as much: it is what tells a star from a pentagon.
    near = torch.nn.functional.max_pool2d(covered, 2 * _BESIDE + 1, stride=1, padding=_BESIDE)
    return pixels, 1 + near * (config.autoencoder.thing_weight - 1)


def _off_scale(latent: Tensor) -> Tensor:
    mean, deviation = latent.mean((0, 2, 3)), latent.std((0, 2, 3))
    return mean.square().mean() + (deviation - 1).square().mean()
