from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dim import model
from dim.features.preparation import Preparation, preparation_of
from dim.model import DIM


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
