from __future__ import annotations

import pytest
import torch
from torch import nn

from dim.learning.trained import load_trained_weights, trained_weights


def module() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 1))
    made[0].requires_grad_(False)
    return made


def test_only_what_learns_is_saved_and_comes_back() -> None:
    one, other = module(), module()
    frozen = other[0].weight.clone()
    saved = trained_weights(one)
    assert saved.keys() == {"1.weight", "1.bias"}
    load_trained_weights(other, saved)
    assert torch.equal(other[1].weight, one[1].weight)
    assert torch.equal(other[0].weight, frozen) and other[1].weight.requires_grad


def test_other_weights_are_refused_by_name() -> None:
    saved = trained_weights(module())
    with pytest.raises(KeyError, match=r"1\.bias"):
        load_trained_weights(module(), {"1.weight": saved["1.weight"]})
    with pytest.raises(KeyError, match=r"0\.weight"):
        load_trained_weights(module(), saved | {"0.weight": torch.zeros(2, 3)})
    with pytest.raises(RuntimeError, match=r"1\.weight is \(1, 1\), not \(1, 2\)"):
        load_trained_weights(module(), saved | {"1.weight": torch.zeros(1, 1)})
