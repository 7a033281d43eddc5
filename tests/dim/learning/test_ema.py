from __future__ import annotations

import torch
from torch import nn

from dim.learning.ema import Ema, averaged


def test_the_average_follows_the_weights() -> None:
    module = nn.Linear(2, 2)
    start = module.weight.detach().clone()
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight += 1
    ema.update(10_000)
    assert torch.allclose(ema.state_dict()["weight"], start + 0.1, atol=1e-6)
    for _ in range(200):
        ema.update(10_000)
    assert torch.allclose(ema.state_dict()["weight"], module.weight, atol=1e-5)


def test_early_averages_forget_the_start() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, decay=0.999)
    with torch.no_grad():
        module.weight.fill_(1.0)
    for step in range(100):
        ema.update(step)
    assert torch.allclose(ema.state_dict()["weight"], torch.ones(2, 2), atol=1e-3)


def test_applied_puts_the_averages_in_and_the_weights_back() -> None:
    module = nn.Linear(2, 2)
    start = module.weight.detach().clone()
    ema = Ema(module, decay=0.9)
    with torch.no_grad():
        module.weight += 1
    trained = module.weight.detach().clone()
    with averaged(ema):
        assert torch.equal(module.weight, start)
    assert torch.equal(module.weight, trained)
    with averaged(None):
        assert torch.equal(module.weight, trained)


def test_what_is_read_into_the_state_is_taken() -> None:
    module = nn.Linear(2, 2)
    ema = Ema(module, 0.9)
    for average in ema.state_dict().values():
        average.fill_(3)
    with averaged(ema):
        assert module.weight.eq(3).all() and module.bias.eq(3).all()


def test_the_averages_may_be_kept_elsewhere() -> None:
    module, same = nn.Linear(2, 2), nn.Linear(2, 2)
    same.load_state_dict(module.state_dict())
    kept, usual = Ema(module, 0.9, "cpu"), Ema(same, 0.9)
    for step in range(3):
        with torch.no_grad():
            module.weight += 1
            same.weight += 1
        kept.update(step)
        usual.update(step)
    for name, average in kept.state_dict().items():
        assert average.device.type == "cpu" and torch.equal(average, usual.state_dict()[name])
    with averaged(kept):
        assert torch.equal(module.weight, kept.state_dict()["weight"])
