"""Whether the published stages fit their GPU: counted with tensors that have shapes and no data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dim.config import load_config
from dim.model.config import ModelConfig
from dim.model.connector import Connector
from dim.model.painter import Painter
from training.stage import StageConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
GPU = 80e9
FROZEN = 2 * (3.75e9 + 0.32e9)  # Qwen2.5-VL-3B and the DC-AE in bfloat16
STATES = 4 * 4  # weights, gradients and AdamW's two moments in float32
HIDDEN, CONDITION = 2048, 2304
TOKENS = {"t2i": 700, "edit1": 1450, "edit2": 1800}  # 1369 of them an image; blueprint, caption
LATENT = (32, 32, 32)


def bytes_of_a_pass(rows: int, tokens: int, *, checkpointed: bool) -> tuple[int, float]:
    """Parameters of connector and painter, and the bytes that a pass keeps for its backward."""
    model = load_config(ModelConfig, CONFIGS / "dim-4.6b.yaml")
    architecture = dict(model.painter.architecture) | {"in_channels": 64}
    kept: dict[int, torch.Tensor] = {}
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16):
        painter = Painter(SanaTransformer2DModel(**architecture), torch.empty(8192, CONDITION))
        connector = Connector(HIDDEN, CONDITION)
        parameters = list(nn.ModuleList([painter, connector]).parameters())
        weights = {p.untyped_storage()._cdata for p in parameters}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()._cdata
            if storage not in weights:
                kept[storage] = tensor  # held, or its address would be given to another one
            return tensor

        painter.train()
        painter.checkpoint_gradients(checkpointed)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            velocity = painter(
                torch.empty(rows, *LATENT),
                torch.zeros(rows, dtype=torch.float64),
                connector(torch.empty(rows, tokens, HIDDEN)),
                torch.ones(rows, tokens, dtype=torch.bool),
                torch.empty(rows, *LATENT),
            )
            assert velocity.shape == (rows, *LATENT)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return sum(p.numel() for p in parameters), total


@pytest.mark.parametrize("name", ["t2i", "edit1", "edit2"])
def test_a_micro_batch_of_the_published_stages_fits_80_gb(name: str) -> None:
    config = load_config(StageConfig, CONFIGS / f"dim-4.6b-{name}.yaml")
    assert config.precision == "bf16" and config.micro_batch is not None
    parameters, kept = bytes_of_a_pass(
        config.micro_batch, TOKENS[name], checkpointed=config.gradient_checkpointing
    )
    needed = parameters * STATES + FROZEN + kept
    print(f"{name}: {needed / 1e9:.0f} GB, of which {kept / 1e9:.0f} GB for the backward pass")
    assert 0.5 * GPU < needed < 0.9 * GPU  # the rest is for what a kernel needs for a moment
    _, checkpointed = bytes_of_a_pass(config.micro_batch, TOKENS[name], checkpointed=True)
    assert checkpointed < kept / 10
