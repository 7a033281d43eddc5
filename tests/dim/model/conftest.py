"""Small random models for the tests of the model."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from dim import model
from dim.config import load_config
from dim.model import released
from dim.model.config import ModelConfig

CONFIGS = Path(__file__).resolve().parents[3] / "configs"
RANDOM = [f"{p}.weights=null" for p in ("understanding", "connector", "painter", "autoencoder")]


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
