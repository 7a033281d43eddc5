"""An adapter's layers in a model: what learns, in which type, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from dim import model as models
from dim.errors import InputError
from dim.learning.step import Trainable
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings
from tests.dim.model.lora.adapters import velocity, with_adapter


def settings(**values: object) -> LoraSettings:
    return LoraSettings.model_validate(values)


def learning(model: models.DIM) -> set[str]:
    return {name for name, each in model.named_parameters() if each.requires_grad}


def test_a_new_adapter_changes_nothing_and_is_all_that_learns(editor: Path) -> None:
    base, model = models.load(editor), models.load(editor)
    layers.attach(model, settings(rank=2, targets=["attn2.to_q", "connector"]), seed=0)
    assert torch.equal(velocity(base), velocity(model))
    wanted = [f"painter.network.transformer_blocks.{n}.attn2.to_q" for n in range(5)]
    wanted += ["connector.0", "connector.2"]
    assert learning(model) == {
        f"{layer}.lora_{half}.default.weight" for layer in wanted for half in "AB"
    }


def test_the_same_seed_begins_with_the_same_numbers(editor: Path) -> None:
    def begun(seed: int) -> list[torch.Tensor]:
        model = models.load(editor)
        state = torch.get_rng_state()
        layers.attach(model, settings(rank=2), seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        return [each for each in model.parameters() if each.requires_grad]

    one, again, other = begun(1), begun(1), begun(2)
    assert all(map(torch.equal, one, again))
    assert not all(map(torch.equal, one, other))


def test_parts_that_are_trained_as_a_whole(editor: Path) -> None:
    model = models.load(editor)
    parts = ["connector", "null_condition", "patch_embed"]
    layers.attach(model, settings(targets=["proj_out"], train=parts), seed=0)
    network = "painter.network."
    assert learning(model) == {
        "painter.null_condition",
        *(f"connector.{name}" for name in ("0.weight", "0.bias", "2.weight", "2.bias")),
        *(f"{network}patch_embed.proj.{name}" for name in ("weight", "bias")),
        *(f"{network}proj_out.lora_{half}.default.weight" for half in "AB"),
    }


def test_what_is_frozen_is_bfloat16_and_what_learns_is_float32(editor: Path) -> None:
    model = models.load(editor)
    parts = {"train": ["null_condition", "patch_embed"]}
    layers.attach(model, settings(rank=2, **parts), seed=0, frozen=torch.bfloat16)
    learnt = learning(model)
    for part in (model.painter, model.connector):
        for parameter in part.parameters():
            wanted = torch.float32 if parameter.requires_grad else torch.bfloat16
            assert parameter.dtype == wanted
    hidden = torch.randn(2, 5, model.connector.in_features)
    noisy, source, target = torch.randn(3, 2, 8, 8, 8)
    seen: set[torch.dtype] = set()
    for block in model.painter.blocks:
        for layer in (block.attn1.to_q, block.attn2.to_k, block.ff.conv_point):
            layer.register_forward_hook(lambda _, __, out: seen.add(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = Trainable(model)(
            noisy, torch.tensor([500.0, 20.0]), hidden, torch.ones(2, 5), source,
            torch.tensor([True, False]),
        )  # fmt: skip
    assert seen == {torch.bfloat16} and velocity.dtype == torch.float32
    (velocity - target).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == (name in learnt), name
        if parameter.grad is not None:
            assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()


def test_sampling_goes_through_an_adapters_layers(editor: Path) -> None:
    model = with_adapter(editor, rank=2, targets=["attn2", "ff", "connector"])
    condition = torch.randn(2, 5, model.painter.condition_features)
    latent = torch.randn(2, 8, 8, 8)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    with torch.no_grad():
        prepared = model.painter.prepare(condition, mask)
        plain = model.painter(latent, 500, condition, mask)
        assert (model.painter(latent, 500, prepared) - plain).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"targets": ["to_q", "to_qq"]}, "no layer is called to_qq; there are time_embed"),
        ({"targets": ["patch_embed"]}, "patch_embed can be trained as a whole: lora.train"),
        ({"targets": ["conv_depth"]}, "no layer is called conv_depth"),
        ({"targets": ["connector"]}, "name a layer of the painter too"),
        ({"train": ["connector"]}, "connector is in lora.train and in lora.targets"),
    ],
)
def test_targets_that_cannot_be(values: dict[str, object], said: str, editor: Path) -> None:
    model = models.load(editor)
    with pytest.raises(InputError, match=said):
        layers.attach(model, settings(**values), seed=0)
    for name in ("attn1.to_q", "attn2.to_out.0", "ff.conv_point", "proj_out", "connector.0"):
        if "no layer" in said:
            with pytest.raises(InputError, match=f" {name},|{name} "):
                layers.attach(model, settings(**values), seed=0)


def test_a_painter_that_sees_no_source_yet_has_to_learn_it(editor: Path) -> None:
    model = models.load(editor)
    with torch.no_grad():
        model.painter.network.patch_embed.proj.weight[:, 8:] = 0
    with pytest.raises(InputError, match="put patch_embed into lora.train"):
        layers.attach(model, settings(), seed=0)
    layers.attach(model, settings(train=["patch_embed"]), seed=0)


@pytest.mark.parametrize(
    "values", [{"rank": 0}, {"alpha": 0}, {"dropout": 1}, {"targets": []}, {"targets": ["."]},
               {"train": ["understanding"]}, {"ranks": 4}],
)  # fmt: skip
def test_settings_that_cannot_be(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        settings(**values)


def test_dropout_depends_on_the_rows_and_not_on_who_computes_them(editor: Path) -> None:
    model = models.load(editor)
    layers.attach(model, settings(rank=2, dropout=0.25), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    noise = torch.randn(4, 8, 8, 8)
    states = torch.randn(4, 6, 128)
    first, second = (model.painter.blocks[n].attn1.to_q.lora_dropout["default"] for n in (0, 1))
    model.train()
    layers.key_dropout(model, noise)
    dropped = first(states)
    assert torch.equal(dropped, first(states)) and not torch.equal(dropped, second(states))
    share = (dropped == 0).float().mean().item()
    assert share == pytest.approx(0.25, abs=0.03)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], states[kept] / 0.75)
    layers.key_dropout(model, noise[1:3])
    assert torch.equal(first(states[1:3]), dropped[1:3])
    layers.key_dropout(model, noise + 1)
    assert not torch.equal(first(states), dropped)
    model.eval()
    assert torch.equal(first(states), states)
