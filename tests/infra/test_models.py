from __future__ import annotations

from pathlib import Path

import torch

from dim import model
from infra.models import load_initial, save_model


def test_a_model_comes_back_from_an_object_store(tiny_model_dir: Path, s3: str) -> None:
    first = model.load(tiny_model_dir)
    save_model(first, f"{s3}/some/model")
    again = load_initial(f"{s3}/some/model", edits=True)
    kept = first.state_dict()
    assert again.config.painter == first.config.painter
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.state_dict().items())


def test_a_text_to_image_painter_is_widened_for_edits_only(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    narrow = model.load(tiny_model_dir)
    config = narrow.config.painter.model_copy(update={"source_latent": False})
    narrow = model.build(narrow.config.model_copy(update={"painter": config}))
    narrow.save(tmp_path / "t2i")
    assert not load_initial(str(tmp_path / "t2i"), edits=False).painter.takes_source
    wide = load_initial(str(tmp_path / "t2i"), edits=True)
    assert wide.painter.takes_source
    kernel, old = (m.painter.network.patch_embed.proj.weight for m in (wide, narrow))
    assert torch.equal(kernel[:, :8], old) and not kernel[:, 8:].any()
