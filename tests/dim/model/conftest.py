"""Small random models for the tests of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import SanaTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

from dim import model
from dim.config import load_config
from dim.model import released
from dim.model.config import ModelConfig
from dim.model.painter import Painter, random_null_condition

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RANDOM = [f"{p}.weights=null" for p in ("understanding", "connector", "painter", "autoencoder")]

PAINTER_SIZES = {
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 16,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "qk_norm": "rms_norm_across_heads",
}


@pytest.fixture(scope="session")
def tiny_config() -> ModelConfig:
    """The tiny configuration with random weights and few steps."""
    return load_config(ModelConfig, CONFIGS / "tiny.yaml", [*RANDOM, "sampling.steps=3"])


@pytest.fixture(scope="session")
def tiny(tiny_config: ModelConfig) -> model.DIM:
    """A random edit model; tests must not change it."""
    return model.build(tiny_config, seed=0)


@pytest.fixture(scope="session")
def photos() -> list[Image.Image]:
    """Four different RGB images of different sizes."""
    rng = np.random.default_rng(0)
    sizes = ((64, 64), (96, 64), (64, 80), (130, 70))
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in sizes
    ]


@pytest.fixture(scope="session", params=["t2i", "edit"])
def golden(request: pytest.FixtureRequest, shared_golden: Path) -> SimpleNamespace:
    """One task's golden tensors and the model that our importer makes of its checkpoint."""
    task = request.param
    connector, painter = released.load(
        shared_golden / f"{task}_model.safetensors",
        attention_head_dim=16,
        cross_attention_head_dim=16,
    )
    io = load_file(shared_golden / f"{task}_io.safetensors")
    return SimpleNamespace(
        file=shared_golden / f"{task}_model.safetensors",
        connector=connector,
        painter=painter,
        io=io,
        loss=load_file(shared_golden / f"{task}_loss.safetensors"),
        source=io["source_latent"] if task == "edit" else None,
    )


@pytest.fixture
def painter() -> Painter:
    """A random text-to-image painter of two small blocks; a test may change it."""
    torch.manual_seed(0)
    return Painter(SanaTransformer2DModel(**PAINTER_SIZES), random_null_condition(12, 24))


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Two latents and sources (2, 4, 3, 5), conditions of 9 and 5 tokens."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.arange(9) < torch.tensor([[9], [5]])
    return {
        "latent": torch.randn(2, 4, 3, 5, generator=generator),
        "source": torch.randn(2, 4, 3, 5, generator=generator),
        "condition": torch.randn(2, 9, 24, generator=generator),
        "mask": mask,
    }
