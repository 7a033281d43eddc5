"""Weights of 8 bits."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

from dim.errors import InputError
from dim.model import DIM
from dim.model.quantize import quantize


def test_without_torchao_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(InputError, match=r"pip install 'dim\[int8\]'"):
        quantize(nn.Linear(2, 2))


def test_only_the_painter_is_quantized(tiny: DIM, monkeypatch: pytest.MonkeyPatch) -> None:
    package, fake, asked = ModuleType("torchao"), ModuleType("torchao.quantization"), []
    fake.Int8WeightOnlyConfig = lambda: "int8"  # type: ignore[attr-defined]
    fake.quantize_ = lambda module, config: asked.append((module, config))  # type: ignore[attr-defined]
    package.quantization = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.setitem(sys.modules, "torchao.quantization", fake)
    assert tiny.speed_up(int8=True) is tiny
    assert asked == [(tiny.painter, "int8")]


def test_numbers_stay_near_and_memory_shrinks() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    layer, states = nn.Linear(256, 256), torch.randn(4, 256)
    with torch.no_grad():
        exact = layer(states)
        quantize(layer)
        assert (layer(states) - exact).abs().max() < 0.02 * exact.abs().max()
