"""Linear attention: diffusers' numbers, and single precision where sums need it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from torch.utils._python_dispatch import TorchDispatchMode

from dim.model.attention import LinearAttention
from dim.model.painter import Painter


class Products(TorchDispatchMode):
    """The type of every product of two batches of matrices, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.types: list[torch.dtype] = []

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.bmm.default:
            self.types.extend(argument.dtype for argument in args)
        return func(*args, **(kwargs or {}))


def test_the_numbers_are_those_of_diffusers(painter: Painter) -> None:
    attention = painter.blocks[0].attn1
    states = torch.randn(2, 16, attention.to_q.in_features)
    ours = attention.processor
    assert isinstance(ours, LinearAttention)
    torch.testing.assert_close(
        ours(attention, states), SanaLinearAttnProcessor2_0()(attention, states), rtol=0, atol=0
    )


def test_sums_over_cells_are_of_single_precision_under_autocast(painter: Painter) -> None:
    attention = painter.blocks[0].attn1
    states = torch.randn(2, 16, attention.to_q.in_features, requires_grad=True)
    linear: list[torch.dtype] = []
    attention.to_q.register_forward_hook(lambda _, given, made: linear.append(made.dtype))
    seen = {}
    for name, processor in (("ours", LinearAttention()), ("plain", SanaLinearAttnProcessor2_0())):
        attention.set_processor(processor)
        with Products() as products:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                attended = attention(states)
            attended.float().square().sum().backward()
        seen[name] = set(products.types)
    assert linear == [torch.bfloat16] * 2, "autocast did nothing, and this test tells nothing"
    assert seen["plain"] == {torch.bfloat16}, "diffusers has mended it: the processor can go"
    assert seen["ours"] == {torch.float32}


def test_a_sum_over_many_cells_keeps_its_small_terms(painter: Painter) -> None:
    """Of 4,096 cells that count alike, the sum in bfloat16 stops growing at 256."""
    attention = painter.blocks[0].attn1
    states = torch.randn(1, 4096, attention.to_q.in_features)
    exact = attention(states)
    errors = []
    for processor in (LinearAttention(), SanaLinearAttnProcessor2_0()):
        attention.set_processor(processor)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            errors.append(((attention(states) - exact).norm() / exact.norm()).item())
    assert errors[0] < errors[1]
