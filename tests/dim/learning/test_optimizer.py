from __future__ import annotations

import torch
from torch import nn

from dim.learning.optimizer import adamw, updates_made


def test_the_settings_are_the_optimizers() -> None:
    module = nn.Linear(2, 2)
    module.weight.data.fill_(1.0)
    optimizer = adamw(module, learning_rate=0.5, betas=(0.8, 0.9), weight_decay=0.2)
    module.weight.grad, module.bias.grad = torch.ones(2, 2), torch.zeros(2)
    optimizer.step()
    # decoupled decay, then a step of the learning rate: Adam's first one has the gradient's sign
    assert torch.allclose(module.weight, torch.full((2, 2), 1 - 0.5 * 0.2 - 0.5))
    (group,) = optimizer.param_groups
    assert group["betas"] == (0.8, 0.9) and len(group["params"]) == 2


def test_updates_are_counted_for_every_parameter() -> None:
    module = nn.Linear(2, 2)
    optimizer = adamw(module, learning_rate=0.1, betas=(0.9, 0.999), weight_decay=0.0)
    assert updates_made(optimizer) == set()
    for _ in range(3):
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert updates_made(optimizer) == {3}
    module.bias.grad = None
    optimizer.step()
    assert updates_made(optimizer) == {3, 4}
