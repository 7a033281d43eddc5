from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.backends.registry import lookup_backend

from dim import model
from dim.errors import InputError
from dim.learning.step import Trainable, changed_cells
from dim.model import DIM, painter


@pytest.fixture(scope="module")
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def batch(rows: int = 3, tokens: int = 5, cells: tuple[int, int] = (8, 8)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(rows, tokens, dtype=torch.bool)
    mask[0, 3:] = False
    return {
        "noisy_latent": torch.randn(rows, 8, *cells, generator=generator),
        "timestep": torch.tensor([10.0, 500.0, 900.0], dtype=torch.float64),
        "hidden_states": torch.randn(rows, tokens, 128, generator=generator),
        "mask": mask,
        "source_latent": torch.randn(rows, 8, *cells, generator=generator),
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


def test_padding_to_a_multiple_changes_no_number(tiny: DIM) -> None:
    given = batch() | {"dropped": torch.tensor([False, True, False])}
    shapes = []
    connect = tiny.connector.forward
    tiny.connector.forward = lambda states: shapes.append(states.shape[1]) or connect(states)
    try:
        plain = Trainable(tiny)(**given)
        padded = Trainable(tiny, token_multiple=64)(**given)
        torch.testing.assert_close(padded, plain, atol=1e-6, rtol=0)
        rows = len(tiny.painter.null_condition)
        Trainable(tiny, token_multiple=10 * rows)(**given)
        with pytest.raises(InputError, match="null table"):  # as without padding
            Trainable(tiny, token_multiple=64)(**batch(tokens=rows + 1))
    finally:
        del tiny.connector.forward
    assert shapes == [5, 64, rows, rows + 1]


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_blocks_are_compiled_once_for_every_padded_length(
    tiny_model_dir: Path, backend: str
) -> None:
    compiled: list[str] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(backend)
        return lookup_backend(backend)(graph, inputs)

    torch._dynamo.reset()
    plain, quick = model.load(tiny_model_dir), model.load(tiny_model_dir)
    quick.painter.compile_blocks(backend=counting)
    one, other = Trainable(plain).train(), Trainable(quick, token_multiple=64).train()
    counts = []
    for tokens in (5, 70, 64, 100, 190, 130, 300, 3):
        given = batch(tokens=tokens)
        losses = [module(**given).square().mean() for module in (one, other)]
        for loss in losses:
            loss.backward()
        counts.append(len(compiled))
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    new = [after > before for before, after in zip([0, *counts], counts, strict=False)]
    assert new == [True, True, False, False, True, False, True, False]  # 64, 128, 192, 320 tokens
    gradients = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.allclose(a.grad, b.grad, atol=1e-3) for a, b in gradients)


@torch._dynamo.config.patch(
    recompile_limit=2,
    accumulated_recompile_limit=2,
    fail_on_recompile_limit_hit=True,  # not a step that is slow
)
def test_compiled_blocks_are_compiled_for_every_shape_and_length(
    tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[int] = []

    def counting(graph: Any, inputs: Any) -> Any:
        compiled.append(1)
        return graph

    monkeypatch.setattr(painter, "_MOST_LENGTHS", 2)
    torch._dynamo.reset()
    plain, quick = model.load(tiny_model_dir), model.load(tiny_model_dir)
    shapes = [(8, 8), (6, 8), (8, 6)]
    quick.painter.compile_blocks(shapes=len(shapes), backend=counting)
    one, other = Trainable(plain).train(), Trainable(quick, token_multiple=64).train()
    counts = []
    for tokens, cells in [*product((5, 70), shapes)] * 2:
        given = batch(tokens=tokens, cells=cells)
        losses = [module(**given).square().mean() for module in (one, other)]
        losses[1].backward()
        counts.append(len(compiled))
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    new = [after > before for before, after in zip([0, *counts], counts, strict=False)]
    assert new == [True] * 6 + [False] * 6
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        other(**batch(tokens=130))


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
