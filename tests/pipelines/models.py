"""Tiny random models in folders, as the filters take them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    BitImageProcessorPil,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

_SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_PICTURE = {"image_size": 32, "patch_size": 16}


def save_clip(folder: Path) -> None:
    """A CLIP model of 8 features."""
    torch.manual_seed(0)
    words = {**_SIZES, "vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(text_config=words, vision_config={**_SIZES, **_PICTURE}, projection_dim=8)
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def save_dino(folder: Path) -> None:
    """A DINOv2 model of 16 features."""
    torch.manual_seed(0)
    Dinov2Model(Dinov2Config(**_SIZES, **_PICTURE)).save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 32}, crop_size=32).save_pretrained(folder)


def save_classifier(folder: Path, labels: list[str]) -> None:
    """A ViT classifier with these labels."""
    torch.manual_seed(0)
    config = ViTConfig(
        **_SIZES, **_PICTURE, id2label=dict(enumerate(labels)),
        label2id={label: place for place, label in enumerate(labels)},
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
