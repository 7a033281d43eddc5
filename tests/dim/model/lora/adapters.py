"""Adapters that were not learnt: of random numbers, in files as training leaves them."""

from __future__ import annotations

from pathlib import Path

import torch

from dim import model as models
from dim.model import DIM
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings

EVERYTHING = {"rank": 4, "alpha": 6, "train": ["null_condition", "patch_embed"]}


def with_adapter(base: Path, seed: int = 0, size: float = 0.05, **settings: object) -> DIM:
    """The model in ``base`` with an adapter's layers, all that would be learnt random."""
    model = models.load(base)
    layers.attach(model, LoraSettings.model_validate(settings), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return model.eval()


def make_adapter(base: Path, folder: Path, seed: int = 0, **settings: object) -> Path:
    """``folder`` with the files of ``with_adapter``."""
    model = with_adapter(base, seed, **settings)
    folder.mkdir(parents=True)
    layers.save(model, LoraSettings.model_validate(settings), folder)
    return folder


def velocity(model: DIM, seed: int = 0) -> torch.Tensor:
    """What ``model`` makes of random hidden states and latents, by the forward of training."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2, 5, model.connector.in_features, generator=generator)
    noisy, source = torch.randn(2, 2, model.painter.latent_channels, 8, 8, generator=generator)
    sources = source if model.painter.takes_source else None
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    with torch.no_grad():
        condition = model.painter.drop_condition(
            model.connector(hidden), torch.tensor([False, True])
        )
        return model.painter(noisy, torch.tensor([700.0, 300.0]), condition, mask, sources)
