from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dim import model
from dim.learning.step import Trainable, changed_cells
from dim.model import DIM


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def batch(rows: int = 3, tokens: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "noisy_latent": torch.randn(rows, 8, 8, 8, generator=generator),
        "timestep": torch.tensor([10.0, 500.0, 900.0], dtype=torch.float64),
        "hidden_states": torch.randn(rows, tokens, 128, generator=generator),
        "mask": mask,
        "source_latent": torch.randn(rows, 8, 8, 8, generator=generator),
        "dropped": torch.zeros(rows, dtype=torch.bool),
    }


def test_the_velocity_is_the_painters_on_the_connected_condition(tiny: DIM) -> None:
    given = batch()
    velocity = Trainable(tiny)(**given)
    expected = tiny.painter(
        given["noisy_latent"],
        given["timestep"],
        tiny.connector(given["hidden_states"]),
        given["mask"],
        given["source_latent"],
    )
    assert velocity.shape == (3, 8, 8, 8) and torch.equal(velocity, expected)


def test_a_dropped_row_sees_the_null_condition_alone(tiny: DIM) -> None:
    given = batch() | {"dropped": torch.tensor([False, True, False])}
    velocity = Trainable(tiny)(**given)
    other = given | {"hidden_states": given["hidden_states"] + 1}
    changed = Trainable(tiny)(**other)
    assert torch.equal(velocity[1], changed[1]) and not torch.equal(velocity[0], changed[0])


def test_everything_trained_gets_a_gradient(tiny: DIM) -> None:
    module = Trainable(tiny)
    module(**batch() | {"dropped": torch.tensor([False, True, False])}).square().mean().backward()
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
    assert weight is not None and weight.shape == (2, 1, 8, 8)
    assert weight[0, 0, 0, 0] == pytest.approx(5 * float(weight[0, 0, 1, 1]))
    assert torch.allclose(weight.mean((1, 2, 3)), torch.ones(2))
    assert torch.equal(weight[1], torch.ones(1, 8, 8))  # nothing changed: nothing stands out


def test_without_a_source_or_a_weight_all_cells_count_alike() -> None:
    latent = torch.randn(2, 8, 8, 8)
    assert changed_cells(latent, None, 5.0) is None
    assert changed_cells(latent, latent + 1, 1.0) is None
