"""Images of several adapters in one batch: each as alone, and as with the adapter merged."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dim import model as models
from dim.errors import CheckpointError, InputError
from dim.model import DIM, block
from dim.model.continuous import ContinuousBatch
from dim.model.paint import Painting
from tests.dim.model.lora.adapters import make_adapter

LAYERS = [
    "to_q", "to_k", "to_v", "to_out", "connector", "time_embed", "caption_projection",
    "conv_inverted", "conv_point", "proj_out",
]  # fmt: skip
PHOTO = Image.effect_noise((70, 50), 90).convert("RGB")


@pytest.fixture(scope="module")
def specs(editor: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("adapters")

    def make(name: str, seed: int, **settings: Any) -> str:
        return str(make_adapter(editor, folder / name, seed, **settings))

    whole = ["null_condition", "patch_embed"]
    return {
        "everywhere": f"{make('a', 1, rank=3, targets=LAYERS, train=whole)}:0.5",
        "queries": make("b", 2, rank=5, alpha=8, targets=["to_q"]),
        "projector": make("c", 3, rank=2, targets=["attn2"], train=["connector"]),
    }


@pytest.fixture(scope="module")
def adapted(editor: Path, specs: dict[str, str]) -> DIM:
    model = models.load(editor)
    model.add_adapters(specs)
    return model


ASKED: list[dict[str, Any]] = [
    {"adapter": "everywhere", "seed": 1, "guidance_scale": 3.0, "steps": 3},
    {"adapter": None, "seed": 2, "guidance_scale": 2.0, "steps": 2},
    {"adapter": "queries", "seed": 3, "guidance_scale": 1.0, "steps": 4},
    {"adapter": "projector", "seed": 4, "guidance_scale": 4.0, "steps": 3},
    {"adapter": "everywhere", "seed": 5, "guidance_scale": 1.0, "steps": 2},
    {"adapter": "projector", "seed": 6, "guidance_scale": 7.5, "negative_prompt": "red"},
]
TEXTS = [f"a circle {'and a square ' * number}" for number in range(len(ASKED))]


def begun(model: DIM, asked: dict[str, Any], text: str) -> Painting:
    if asked["seed"] % 2:
        return model.begin_edit(PHOTO, text, fit="square", **asked)
    return model.begin_generation(text, **asked)


def latents(model: DIM, paintings: Sequence[Painting]) -> list[torch.Tensor]:
    """What becomes of ``paintings`` in one batch."""
    batch = ContinuousBatch(model.painter, model.adapters)
    for painting in paintings:
        batch.join(painting.denoising)
    while not all(painting.denoising.done for painting in paintings):
        assert not batch.step()
    return [painting.denoising.latent for painting in paintings]


@pytest.mark.parametrize("numbers", [1 << 24, 700 * 64])
def test_every_image_of_a_batch_is_the_same_to_the_bit_as_alone(
    numbers: int, adapted: DIM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the feed-forward layers see a row or two at a time."""
    pairs = list(zip(ASKED, TEXTS, strict=True))
    alone = [latents(adapted, [begun(adapted, *pair)])[0] for pair in pairs]
    monkeypatch.setattr(block, "WIDE_NUMBERS", numbers)
    paintings = [begun(adapted, *pair) for pair in pairs]
    for one, other in zip(alone, latents(adapted, paintings), strict=True):
        assert torch.equal(one, other)
    assert max(painting.denoising.company for painting in paintings) == len(ASKED)


@pytest.mark.parametrize("name", ["everywhere", "queries", "projector", None])
def test_an_image_is_that_of_a_model_with_the_adapter_merged(
    name: str | None, adapted: DIM, specs: dict[str, str], editor: Path
) -> None:
    merged = models.load(editor, lora=[] if name is None else [specs[name]])
    for asked, text in zip(ASKED, TEXTS, strict=True):
        if asked["adapter"] == name:
            (mine,) = latents(adapted, [begun(adapted, asked, text)])
            (theirs,) = latents(merged, [begun(merged, {**asked, "adapter": None}, text)])
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
            if name is not None:
                (plain,) = latents(adapted, [begun(adapted, {**asked, "adapter": None}, text)])
                assert (mine - plain).abs().max() > 1e-3


def test_without_an_adapter_no_bit_changes(adapted: DIM, editor: Path) -> None:
    plain = models.load(editor)
    images = [model.generate(["a cup"], seeds=[3], steps=2)[0] for model in (adapted, plain)]
    assert np.array_equal(*images)


def test_the_same_again_keeps_its_adapter(adapted: DIM) -> None:
    first = begun(adapted, {**ASKED[0], "seed": 9}, "a cup")
    (again,) = latents(adapted, [begun(adapted, ASKED[0], "a cup").again(9)])
    assert torch.equal(again, latents(adapted, [first])[0])


def test_what_was_learnt_on_regions_is_shown_regions_and_nobody_else(
    editor: Path, tmp_path: Path
) -> None:
    model = models.load(editor)
    model.config = model.config.showing("region")
    from dim.model.lora import layers
    from dim.model.lora.settings import LoraSettings

    settings = LoraSettings(targets=["to_q"])
    layers.attach(model, settings, seed=0)
    layers.save(model, settings, tmp_path)
    other = models.load(editor)
    other.add_adapters({"region": str(tmp_path)})
    wide = PHOTO.resize((128, 64))
    asked = {"seed": 1, "steps": 1, "fit": "square"}
    regions = latents(other, [other.begin_edit(wide, "a", adapter="region", **asked)])[0]
    assert not torch.equal(regions, latents(other, [other.begin_edit(wide, "a", **asked)])[0])
    assert other.config.understanding.vlm_view == "whole"


def test_names_that_are_not_there_and_files_that_do_not_fit(
    adapted: DIM, editor: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no adapter 'query'; there are: everywhere, queries"):
        adapted.begin_generation("a", adapter="query")
    plain = models.load(editor)
    with pytest.raises(InputError, match="no adapter 'queries'; there are none"):
        plain.begin_generation("a", adapter="queries")
    with pytest.raises(CheckpointError, match="not found"):
        plain.add_adapters({"gone": str(tmp_path / "gone")})


def test_memory_is_what_lies_beside_the_weights(adapted: DIM) -> None:
    assert adapted.adapters is not None
    width, layers = 128, 2 * len(adapted.painter.blocks)
    assert adapted.adapters.bytes["queries"] == layers * 4 * 5 * 2 * width


def test_a_model_that_nobody_uses_is_gone_at_once(editor: Path, specs: dict[str, str]) -> None:
    model = models.load(editor)
    model.add_adapters(specs)
    latents(model, [begun(model, ASKED[0], "a")])
    there = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert there() is None
    finally:
        gc.enable()
