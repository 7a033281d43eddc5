from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def editor(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small random DIM with a painter that sees its source, as one that was trained does."""
    import torch

    from dim import model

    folder = tmp_path_factory.mktemp("editor") / "model"
    made = model.load(tiny_model_dir)
    kernel = made.painter.network.patch_embed.proj.weight
    with torch.no_grad():
        kernel[:, 8:] = kernel[:, :8].flip(0)
    made.save(folder)
    return folder
