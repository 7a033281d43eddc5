from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dim import model
from dim.learning.step import Trainable, changed_cells
from dim.model import DIM, flow
from infra.models import load_initial


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def batch(rows: int = 3, tokens: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "hidden_states": torch.randn(rows, tokens, 128, generator=generator),
        "mask": mask,
        "latent": torch.randn(rows, 8, 8, 8, generator=generator),
        "source_latent": torch.randn(rows, 8, 8, 8, generator=generator),
        "noise": torch.randn(rows, 8, 8, 8, generator=generator),
        "index": torch.tensor([10, 500, 900]),
        "dropped": torch.zeros(rows, dtype=torch.bool),
    }


def test_the_loss_is_flow_matching_on_the_connected_condition(tiny: DIM) -> None:
    given = batch()
    losses = Trainable(tiny)(**given)
    expected = flow.loss(
        tiny.painter,
        given["latent"],
        given["noise"],
        given["index"],
        tiny.connector(given["hidden_states"]),
        given["mask"],
        source_latent=given["source_latent"],
        schedule=flow.FlowSchedule(tiny.config.sampling.shift),
    )
    assert losses.shape == (3,) and torch.equal(losses, expected)


def test_a_dropped_row_sees_the_null_condition_alone(tiny: DIM) -> None:
    given = batch() | {"dropped": torch.tensor([False, True, False])}
    losses = Trainable(tiny)(**given)
    other = given | {"hidden_states": given["hidden_states"] + 1}
    changed = Trainable(tiny)(**other)
    assert torch.equal(losses[1], changed[1]) and losses[0] != changed[0]


def test_everything_trained_gets_a_gradient(tiny: DIM) -> None:
    module = Trainable(tiny, 5.0)
    module(**batch() | {"dropped": torch.tensor([False, True, False])}).mean().backward()
    missing = [name for name, p in module.named_parameters() if p.grad is None]
    module.zero_grad()
    assert not missing
    assert not any(p.requires_grad for p in tiny.conditioner.parameters())
    assert not any(p.requires_grad for p in tiny.autoencoder.parameters())


def test_changed_cells_count_more_and_the_mean_stays_one() -> None:
    source = torch.randn(2, 8, 8, 8)
    latent = source.clone()
    latent[0, :, 0, 0] += 2.0
    weight = changed_cells(latent, source, 5.0)
    assert weight.shape == (2, 1, 8, 8)
    assert weight[0, 0, 0, 0] == pytest.approx(5 * float(weight[0, 0, 1, 1]))
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(2))
    assert torch.equal(weight[1], torch.ones(1, 8, 8))  # nothing changed: nothing stands out


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
