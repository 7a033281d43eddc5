from __future__ import annotations

import copy
import io
import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from dim.errors import ConfigError
from dim.learning.optimizer import (
    OPTIMIZERS,
    OptimizerSettings,
    make_optimizers,
    set_learning_rate,
    updates_made,
)

SETTINGS = OptimizerSettings(learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.2)


class Small(nn.Module):
    """One of each: a first and a last layer, a table, a norm, hidden matrices, a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(2, 4, 1)
        self.hidden = nn.Linear(4, 4)
        self.pointwise = nn.Conv2d(4, 6, 1)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.norm = nn.LayerNorm(6)
        self.proj_out = nn.Linear(6, 2)
        self.table = nn.Parameter(torch.randn(3, 2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        states = self.hidden(self.patch_embed(image).movedim(1, 3)).movedim(3, 1)
        wide = self.depthwise(self.pointwise(states)).movedim(1, 3)
        return self.proj_out(self.norm(wide)) + self.table.sum(0)


def step(module: nn.Module, optimizers: list[Optimizer]) -> None:
    module.zero_grad()
    image = torch.randn(2, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    (module(image) - 1).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def test_the_settings_are_the_optimizers() -> None:
    module = nn.Linear(2, 2)
    module.weight.data.fill_(1.0)
    (optimizer,) = make_optimizers("adamw", module, SETTINGS)
    module.weight.grad, module.bias.grad = torch.ones(2, 2), torch.zeros(2)
    optimizer.step()
    # decoupled decay, then a step of the learning rate: Adam's first one has the gradient's sign
    assert torch.allclose(module.weight, torch.full((2, 2), 1 - 0.5 * 0.2 - 0.5))
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.9) and len(group["params"]) == 2


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_everything_that_wants_a_gradient_is_trained_and_counted(name: str) -> None:
    module = Small()
    module.norm.bias.requires_grad_(False)
    before = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    optimizers = make_optimizers(name, module, SETTINGS)
    assert updates_made(optimizers) <= {0}
    for _ in range(3):
        step(module, optimizers)
    assert updates_made(optimizers) == {3}
    same = [key for key, tensor in module.state_dict().items() if torch.equal(tensor, before[key])]
    assert same == ["norm.bias"]


def test_an_update_that_left_out_a_parameter_shows() -> None:
    module = nn.Linear(2, 2)
    optimizers = make_optimizers("adamw", module, SETTINGS)
    module(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    module.bias.grad = None
    optimizers[0].step()
    assert updates_made(optimizers) == {1, 2}


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    module = Small()
    muon, adamw = make_optimizers("muon", module, SETTINGS)
    assert isinstance(muon, Muon) and isinstance(adamw, AdamW)
    taken = [tuple(p.shape) for p in muon.param_groups[0]["params"]]
    assert taken == [(4, 4), (6, 4)]  # hidden, and the pointwise convolution as a matrix
    rest = {id(p) for p in adamw.param_groups[0]["params"]}
    named = {name for name, p in module.named_parameters() if id(p) in rest}
    assert named == {n for n, _ in module.named_parameters()} - {
        "hidden.weight",
        "pointwise.weight",
    }
    assert muon.param_groups[0]["weight_decay"] == 0.2
    assert muon.param_groups[0]["lr"] == adamw.param_groups[0]["lr"] == 0.5


def test_muon_moves_a_pointwise_convolution_as_it_would_move_the_matrix() -> None:
    pointwise, linear = nn.Conv2d(4, 6, 1, bias=False), nn.Linear(4, 6, bias=False)
    linear.weight.data.copy_(pointwise.weight.detach().flatten(1))
    image = torch.randn(2, 4, 3, 3)
    for module, given in ((pointwise, image), (linear, image.movedim(1, 3))):
        optimizers = make_optimizers("muon", module, SETTINGS)
        assert len(optimizers) == 1  # nothing is left for AdamW
        for _ in range(2):
            module.zero_grad()
            module(given).square().sum().backward()
            optimizers[0].step()
    torch.testing.assert_close(pointwise.weight.flatten(1), linear.weight, rtol=0, atol=1e-4)


def test_muon_goes_on_from_what_was_saved() -> None:
    through, again = Small(), Small()
    optimizers = make_optimizers("muon", through, SETTINGS)
    for _ in range(2):
        step(through, optimizers)
    again.load_state_dict(through.state_dict())
    others = make_optimizers("muon", again, SETTINGS)
    for optimizer, other in zip(optimizers, others, strict=True):
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(through, optimizers)
    step(again, others)
    assert updates_made(others) == {3}
    for one, two in zip(through.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_learning_rate_is_that_of_all(name: str) -> None:
    optimizers = make_optimizers(name, Small(), SETTINGS)
    optimizers[0].param_groups[0]["lr"] = torch.tensor(0.5)  # as torchao keeps it
    kept = optimizers[0].param_groups[0]["lr"]
    set_learning_rate(optimizers, 0.25)
    assert kept == 0.25 and optimizers[0].param_groups[0]["lr"] is kept
    assert {float(group["lr"]) for one in optimizers for group in one.param_groups} == {0.25}


def test_8_bits_come_from_the_first_package_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(ConfigError, match="needs torchao or bitsandbytes.*pip install torchao"):
        make_optimizers("adamw8bit", Small(), SETTINGS)
    package = ModuleType("bitsandbytes")
    package.optim = ModuleType("bitsandbytes.optim")  # type: ignore[attr-defined]
    package.optim.AdamW8bit = AdamW  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", package)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package.optim)
    module = Small()
    module.table.requires_grad_(False)
    (optimizer,) = make_optimizers("adamw8bit", module, SETTINGS)
    assert optimizer.defaults["betas"] == (0.8, 0.9) and optimizer.defaults["lr"] == 0.5
    assert len(optimizer.param_groups[0]["params"]) == len(list(module.parameters())) - 1


def test_8_bits_learn() -> None:
    pytest.importorskip("torchao.optim", reason="torchao is an optional package")
    torch.manual_seed(0)
    module = nn.Linear(64, 64)  # smaller tensors keep their moments in 32 bits
    optimizers = make_optimizers("adamw8bit", module, OptimizerSettings(1e-2, (0.9, 0.99), 0.0))
    given, losses = torch.randn(32, 64), []
    for _ in range(20):
        set_learning_rate(optimizers, 1e-2)
        module.zero_grad()
        loss = (module(given) - given).square().mean()
        loss.backward()
        optimizers[0].step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and updates_made(optimizers) == {20}
    moment = next(iter(optimizers[0].state.values()))["exp_avg"]
    assert "8bit" in type(moment).__name__

    file = io.BytesIO()
    torch.save(optimizers[0].state_dict(), file)
    file.seek(0)
    (again,) = make_optimizers("adamw8bit", module, OptimizerSettings(1e-2, (0.9, 0.99), 0.0))
    again.load_state_dict(torch.load(file, weights_only=True))
    kept = next(iter(again.state.values()))["exp_avg"]
    assert type(kept) is type(moment) and torch.equal(kept.dequantize(), moment.dequantize())
    again.step()
    assert updates_made([again]) == {21}


def test_the_registry_has_what_a_stage_may_choose() -> None:
    assert set(OPTIMIZERS) == {"adamw", "adamw8bit", "muon"}
