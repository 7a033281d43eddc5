from __future__ import annotations

import pytest
import torch

from dim.features.packing import pack_bf16, pack_int8, relative_error, unpack_bf16, unpack_int8


def test_bfloat16_comes_back_bit_for_bit() -> None:
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    every = numbers.view(torch.bfloat16).reshape(256, 256)
    back = unpack_bf16(pack_bf16(every), (256, 256))
    assert back.dtype == torch.bfloat16
    assert torch.equal(back.view(torch.int16), every.view(torch.int16))  # NaNs and zeros' signs too


def test_float32_is_rounded_to_the_nearest_bfloat16() -> None:
    states = torch.randn(5, 7)
    assert torch.equal(unpack_bf16(pack_bf16(states), (5, 7)), states.bfloat16())


def test_8_bits_are_off_by_half_a_scale_at_most() -> None:
    states = torch.randn(64, 48) * torch.logspace(-3, 3, 64)[:, None]
    states[7] = 0
    numbers, scales = pack_int8(states)
    assert len(numbers) == 64 * 48 and len(scales) == 64 * 4
    back = unpack_int8(numbers, scales, (64, 48))
    half = states.abs().amax(1) / 127 / 2
    assert ((back - states).abs() <= half[:, None] * 1.001).all()
    assert not back[7].any()
    # A token's largest value is exact: the scale is made of it.
    peak = states.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, peak), states.gather(1, peak), rtol=1e-6)


def test_a_value_far_out_costs_only_its_own_token() -> None:
    states = torch.randn(2, 256)
    states[0, 3] = 1000.0
    back = unpack_int8(*pack_int8(states), (2, 256))
    assert relative_error(states[1], back[1]) < 0.01
    assert not back[0, 4:].any()  # the others of this token are below half a step


def test_the_error_is_relative() -> None:
    states = torch.full((3, 4), 2.0)
    assert relative_error(states, states) == 0
    assert relative_error(states, states * 1.5) == pytest.approx(0.5)


def test_data_of_another_length_is_refused() -> None:
    numbers, scales = pack_int8(torch.randn(3, 4))
    with pytest.raises(ValueError, match="reshape|size"):
        unpack_int8(numbers[:-1], scales, (3, 4))
    with pytest.raises(ValueError, match="reshape|size"):
        unpack_int8(numbers, scales[:-4], (3, 4))
    with pytest.raises(ValueError, match="reshape|size"):
        unpack_bf16(pack_bf16(torch.randn(3, 4))[:-2], (3, 4))
