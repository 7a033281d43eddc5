from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dim import model
from dim.features.format import (
    Preparation,
    pack_bf16,
    pack_int8,
    preparation_of,
    relative_error,
    unpack_bf16,
    unpack_int8,
)
from dim.model import DIM


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
    states = torch.randn(2, 256, generator=torch.Generator().manual_seed(0))
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


@pytest.fixture
def tiny(tiny_model_dir: Path) -> DIM:
    return model.load(tiny_model_dir)


def of(parts: Any, **changes: Any) -> Preparation:
    return preparation_of(parts, **{"edits": True, "resolution": 64, **changes})


def test_training_saving_and_precision_change_nothing(tiny: DIM, tmp_path: Path) -> None:
    before = of(tiny)
    torch.nn.init.normal_(tiny.connector.state_dict()["0.weight"])
    torch.nn.init.normal_(tiny.painter.null_condition.data)
    tiny.conditioner.encode(["a text", "another one, and longer"])
    tiny.save(tmp_path / "saved")
    assert of(model.load(tmp_path / "saved")) == before
    tiny.conditioner.bfloat16()
    tiny.autoencoder.bfloat16()
    assert of(tiny) == before


def _nudge(state: dict[str, torch.Tensor], name: str) -> None:
    with torch.no_grad():
        state[name].view(-1)[0] += 1


CHANGES: list[tuple[Callable[[DIM], object], str]] = [
    (
        lambda dim: _nudge(dim.conditioner.model.state_dict(), "model.language_model.norm.weight"),
        "the weights of the understanding model",
    ),
    (
        lambda dim: _nudge(
            dim.conditioner.model.state_dict(), "model.visual.patch_embed.proj.weight"
        ),
        "the weights of the understanding model",
    ),
    (
        lambda dim: _nudge(
            dim.autoencoder.network.state_dict(),
            next(iter(dim.autoencoder.network.state_dict())),
        ),
        "the weights or the scale of the autoencoder",
    ),
    (
        lambda dim: dim.autoencoder.network.register_to_config(scaling_factor=0.5),
        "the weights or the scale of the autoencoder",
    ),
    (
        lambda dim: dim.conditioner.tokenizer.add_tokens(["<new>"]),
        "the tokenizer or its chat template",
    ),
    (lambda dim: setattr(dim.conditioner, "image_size", 32), r"image_size \(64 there, 32 here\)"),
    (
        lambda dim: setattr(dim.conditioner, "max_condition_tokens", 9),
        r"max_condition_tokens \(512 there, 9 here\)",
    ),
    (
        lambda dim: setattr(dim.conditioner.image_processor, "image_mean", (0.0, 0.0, 0.0)),
        "the image processor",
    ),
]


@pytest.mark.parametrize(("change", "phrase"), CHANGES)
def test_what_changes_the_features_is_told(
    tiny: DIM, change: Callable[[DIM], object], phrase: str
) -> None:
    before = of(tiny)
    change(tiny)
    (said,) = before.differences(of(tiny))
    assert re.match(phrase, said), said


def test_the_chat_template_counts(tiny: DIM) -> None:
    before = of(tiny)
    tokenizer = tiny.conditioner.tokenizer
    tokenizer.chat_template = tokenizer.chat_template.replace("system", "System")
    tiny.conditioner.chat = type(tiny.conditioner.chat)(tokenizer)
    (said,) = before.differences(of(tiny))
    assert said.startswith("the tokenizer or its chat template")


def test_text_to_image_does_not_depend_on_how_images_are_shown(tiny: DIM) -> None:
    before = of(tiny, edits=False)
    tiny.conditioner.image_size = 32
    assert of(tiny, edits=False) == before
    assert of(tiny, edits=False, resolution=32).differences(before) == [
        "the resolution (32 there, 64 here)"
    ]
