"""Of a model folder the understanding model alone: what designs, without what paints."""

from __future__ import annotations

from pathlib import Path

import torch

from dim.model import parts
from dim.model.checkpoint import folder
from dim.model.understanding import Understanding


def load_understanding(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Understanding:
    """The understanding model of a DIM folder; neither painter nor autoencoder is read.

    Args:
        path: the folder.
        device: where to put it; default is the CPU.
        dtype: its floating type; default is as saved.

    Raises:
        CheckpointError: no such folder, not a DIM, or its understanding model is missing,
            damaged or has become another.
    """
    path = Path(path)
    config = folder.located(path, folder.read_description(path)).understanding
    conditioner = parts.conditioner(config, dtype=dtype)
    if device is not None:
        conditioner.model.to(device)
    return Understanding(conditioner, config)
