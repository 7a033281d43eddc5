"""The tiny models' frozen parts: trained, saved as float16, and measured on held-out scenes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from dim.model import parts
from dim.model.checkpoint.folder import UNDERSTANDING, write_understanding
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig, UnderstandingConfig
from dim.tiny.autoencoder import reconstruction_accuracy, train_autoencoder
from dim.tiny.config import TinyBuildConfig
from dim.tiny.schedule import Progress
from dim.tiny.understanding import design_accuracy, train_binding, train_understanding

Builder = Callable[[TinyBuildConfig, ModelConfig, Path, Progress], dict[str, float]]
"""Trains a part, saves it in the folder, and returns its held-out accuracies."""


def build_autoencoder(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train and save the DC-AE; returns its held-out accuracy."""
    network = train_autoencoder(config, model.autoencoder, out / "logs", progress)
    network.to(torch.float16).save_pretrained(out / "autoencoder")
    return reconstruction_accuracy(config, network.float())


def build_understanding(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Train and save the Qwen2.5-VL with its tokenizer; returns its held-out accuracies."""
    section = model.understanding
    conditioner = train_understanding(config, section, out / "logs", progress)
    return _finish_understanding(config, section, conditioner, out)


def build_binding(
    config: TinyBuildConfig, model: ModelConfig, out: Path, progress: Progress
) -> dict[str, float]:
    """Go on with the Qwen2.5-VL in ``out``, binding words; returns its held-out accuracies."""
    conditioner = _pretrained(model, out)
    train_binding(config, conditioner, out / "logs", progress)
    return _finish_understanding(config, model.understanding, conditioner, out)


def _pretrained(model: ModelConfig, out: Path) -> Conditioner:
    """The understanding model that an earlier part left in ``out``."""
    section = model.understanding.model_copy(update={"weights": str(out / UNDERSTANDING)})
    return parts.conditioner(section, dtype=torch.float32)


def _finish_understanding(
    config: TinyBuildConfig, model: UnderstandingConfig, conditioner: Conditioner, out: Path
) -> dict[str, float]:
    """Save the understanding model and its settings in ``out``; returns its accuracies."""
    conditioner.model.half()
    write_understanding(out / UNDERSTANDING, conditioner)
    (out / f"{UNDERSTANDING}.json").write_text(settings_of(model), encoding="utf-8")
    conditioner.model.float()
    return design_accuracy(config, conditioner, model.design_max_new_tokens)


def settings_of(model: UnderstandingConfig) -> str:
    """``model`` as JSON without what its folder says: with these settings its weights are used."""
    settings = model.model_dump(mode="json", exclude={"weights", "architecture"})
    return json.dumps(settings, indent=2) + "\n"
