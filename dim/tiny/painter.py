"""The tiny SANA with its connector, pretrained on tabletop text-to-image alone.

It stands where SANA1.5's weights stand for a real user: a painter that knows words, shapes and
places, and has never seen an edit.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dim import tabletop
from dim.model import parts, sampler
from dim.model.autoencoder import Autoencoder
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig
from dim.model.connector import Connector
from dim.model.flow import FlowSchedule, loss, noise_levels
from dim.model.painter import Painter
from dim.model.pixels import to_images, to_pixels
from dim.tabletop import Scene
from dim.tiny.config import PainterPartConfig, TinyBuildConfig
from dim.tiny.corpus import edit
from dim.tiny.schedule import Progress, Trainer, seeded

_CHUNK = 64
_EVALUATION_STEPS = 20


class Features(NamedTuple):
    """Frozen views of scenes: hidden states (N, L, H) and mask (N, L), latents (N, C, h, w)."""

    states: Tensor
    mask: Tensor
    latents: Tensor


class Trained(nn.Module):
    """The two modules that are trained together."""

    def __init__(self, connector: Connector, painter: Painter) -> None:
        super().__init__()
        self.connector, self.painter = connector, painter


def train_painter(
    config: TinyBuildConfig,
    model: ModelConfig,
    conditioner: Conditioner,
    autoencoder: Autoencoder,
    out: Path,
    progress: Progress,
) -> Trained:
    """Train connector and painter from nothing; returns the average of their weights over time.

    The log goes to ``out/painter.jsonl``.
    """
    part = config.painter
    seeded(config.seed)
    features = _features(
        [_scene(config, i) for i in range(part.scenes)], config, conditioner, autoencoder
    )
    section = model.painter.model_copy(update={"weights": None, "source_latent": False})
    painter = parts.painter(section, seed=config.seed).train()
    plain = model.connector.model_copy(update={"weights": None})
    connector = parts.connector(plain, conditioner.hidden_size, seed=config.seed).train()
    trained = Trained(connector, painter)
    average = copy.deepcopy(trained).requires_grad_(False)
    trainer = Trainer("painter", [trained], part, out / "painter.jsonl", progress)
    schedule, generator = FlowSchedule(), torch.Generator().manual_seed(config.seed)
    for step in range(part.steps):
        rows = torch.randint(part.scenes, (part.batch_size,), generator=generator)
        trainer.update(_loss(trained, features, rows, schedule, generator, part))
        _follow(average, trained, min(part.ema_decay, (step + 1) / (step + 10)))
    return average.eval()


@torch.no_grad()
def painting_accuracy(
    config: TinyBuildConfig, conditioner: Conditioner, autoencoder: Autoencoder, trained: Trained
) -> dict[str, float]:
    """Share of held-out captions painted as they say, whatever the free positions within a place.

    ``objects`` asks for every thing in its place and nothing else, ``background`` for the table.
    """
    scenes = [edit(config, "evaluation", i).source for i in range(config.evaluate)]
    features = _features(scenes, config, conditioner, autoencoder)
    noise = torch.randn(features.latents.shape, generator=torch.Generator().manual_seed(0))
    latent = sampler.sample(
        trained.painter,
        noise,
        trained.connector(features.states.float()),
        features.mask,
        steps=_EVALUATION_STEPS,
        guidance_scale=1.0,
    )
    read = [tabletop.read(image) for image in to_images(autoencoder.decode(latent))]
    objects = [
        not found.unknown and _listed(found.scene) == _listed(scene)
        for found, scene in zip(read, scenes, strict=True)
    ]
    tables = [r.scene.background == s.background for r, s in zip(read, scenes, strict=True)]
    return {"objects": sum(objects) / len(scenes), "background": sum(tables) / len(scenes)}


def _listed(scene: Scene) -> list[tuple[str, ...]]:
    return sorted((t.size, t.colour, t.shape, t.place) for t in scene.objects)


def _scene(config: TinyBuildConfig, index: int) -> Scene:
    """The target of an edit, so that every table and style of the world is seen."""
    return edit(config, "painter", index).target


@torch.no_grad()
def _features(
    scenes: list[Scene],
    config: TinyBuildConfig,
    conditioner: Conditioner,
    autoencoder: Autoencoder,
) -> Features:
    states, masks, latents = [], [], []
    for start in range(0, len(scenes), _CHUNK):
        some = scenes[start : start + _CHUNK]
        state, mask = conditioner.encode([tabletop.caption(scene) for scene in some])
        states += [row[keep].half() for row, keep in zip(state, mask, strict=True)]
        masks += [torch.ones(len(row), dtype=torch.bool) for row in states[-len(some) :]]
        pixels = to_pixels([tabletop.render(scene, config.resolution) for scene in some])
        latents.append(autoencoder.encode(pixels).float())
    pad = nn.utils.rnn.pad_sequence
    return Features(pad(states, batch_first=True), pad(masks, batch_first=True), torch.cat(latents))


def _loss(
    trained: Trained,
    features: Features,
    rows: Tensor,
    schedule: FlowSchedule,
    generator: torch.Generator,
    part: PainterPartConfig,
) -> Tensor:
    """Mean flow-matching loss of a batch, some of whose conditions are dropped."""
    painter = trained.painter
    mask = features.mask[rows]
    longest = int(mask.sum(1).max())
    mask, states = mask[:, :longest], features.states[rows, :longest].float()
    drop = torch.rand(len(rows), generator=generator) < part.condition_dropout
    condition = painter.drop_condition(trained.connector(states), drop)
    x0 = features.latents[rows]
    noise = torch.randn(x0.shape, generator=generator)
    index = noise_levels(torch.randn(len(rows), generator=generator))
    return loss(painter, x0, noise, index, condition, mask, schedule=schedule).mean()


@torch.no_grad()
def _follow(average: nn.Module, trained: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(list(average.parameters()), list(trained.parameters()), 1 - decay)
