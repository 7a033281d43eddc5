"""What the checkpoints of a stage hold, for tests to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from infra import storage
from training.checkpoint_files import read_into, read_layout, read_manifest


def steps_saved(out: str | Path) -> list[int]:
    """The steps of a stage's whole checkpoints."""
    names = storage.open_store(f"{out}/checkpoints").list(suffix="manifest.json")
    return [int(name[len("step-") :].partition("/")[0]) for name, _ in names]


def read_saved(out: str | Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Values and tensors of the latest checkpoint."""
    store = storage.open_store(f"{out}/checkpoints")
    folder = f"step-{steps_saved(out)[-1]:08d}"
    manifest = read_manifest(store, folder)
    layout = read_layout(store, folder, manifest)
    tensors = {name: torch.empty(saved.shape, dtype=saved.dtype) for name, saved in layout.items()}
    read_into(tensors, store, folder, layout)
    return manifest.values, tensors
