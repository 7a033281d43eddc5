from __future__ import annotations

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

from dim import model
from dim.blueprint import Blueprint
from dim.config import load_config
from dim.designers.self_play import SelfDesigner
from dim.errors import CheckpointError, ConfigError, DesignerError, InputError
from dim.model.checkpoint import reference
from dim.model.checkpoint.folder import read_description
from dim.model.config import ModelConfig

BLUEPRINT = Blueprint("Remove it.", "A table.", "A red circle.", "The middle.", "Empty.").render()


@pytest.fixture(scope="module")
def saved(tiny, tmp_path_factory):
    """The random model, saved."""
    path = tmp_path_factory.mktemp("saved") / "model"
    tiny.save(path)
    return path


class Recorded:
    """A designer that answers from a list."""

    name = fingerprint = "recorded"
    costly = False

    def __init__(self, *answers):
        self.answers, self.requests = list(answers), []

    def design(self, requests, *, on_answer=None):
        self.requests += requests
        return [self.answers.pop(0) for _ in requests]


def difference(one: Image.Image, other: Image.Image) -> int:
    return int(np.asarray(ImageChops.difference(one, other)).max())


def test_building_is_deterministic_by_seed(tiny, tiny_config):
    def weights(dim):
        return torch.cat([p.flatten() for p in dim.parameters()])

    state = torch.random.get_rng_state()
    again, other = model.build(tiny_config, seed=0), model.build(tiny_config, seed=1)
    assert torch.equal(weights(again), weights(tiny))
    assert not torch.equal(weights(other), weights(tiny))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_only_connector_and_painter_are_trained(tiny):
    trained = set(tiny.trainable_parameters())
    assert tiny.painter.null_condition in trained
    assert {p for p in tiny.parameters() if p.requires_grad} == trained
    tiny.train()
    assert tiny.painter.training and not tiny.conditioner.model.training
    assert not tiny.autoencoder.network.training
    tiny.eval()
    assert not tiny.painter.training


def test_an_edit_does_not_depend_on_its_neighbours(tiny, photos):
    told = ["remove it", "a much longer instruction than the first one", "blue", "red"]
    seeds = [5, 6, 7, 5]
    scales = [7.5, 1.0, 3.0, 7.5]
    together = tiny.edit(photos, told, seeds=seeds, guidance_scale=scales)
    assert [(r.image.size, r.image.mode) for r in together] == [(p.size, "RGB") for p in photos]
    assert [r.blueprint for r in together] == [None] * 4
    for row, result in enumerate(together):
        alone = tiny.edit(
            photos[row : row + 1],
            told[row : row + 1],
            seeds=seeds[row : row + 1],
            guidance_scale=scales[row],
        )
        assert difference(alone[0].image, result.image) <= 1
    split = tiny.edit(photos, told, seeds=seeds, guidance_scale=scales, batch_size=3)
    assert max(difference(a.image, b.image) for a, b in zip(split, together, strict=True)) <= 1


def test_seed_steps_guidance_image_and_text_all_count(tiny, photos):
    def edited(image=photos[0], text="remove it", **options):
        return tiny.edit([image], [text], **options)[0].image

    base = edited()
    assert difference(edited(), base) == 0
    assert difference(edited(seeds=[233], steps=3, guidance_scale=1.0), base) == 0
    for other in (
        edited(seeds=[1]),
        edited(steps=5),
        edited(guidance_scale=4.5),
        edited(image=photos[1]),
        edited(text="add a red square"),
    ):
        assert difference(other, base) > 0


def test_a_given_blueprint_is_painted_and_asks_no_designer(tiny, photos):
    designer = Recorded(BLUEPRINT)
    results = tiny.edit(
        photos[:2], ["remove it", "blue"], blueprints=["my own plan", None], designer=designer
    )
    assert [r.blueprint for r in results] == ["my own plan", BLUEPRINT]
    assert [r.instruction for r in designer.requests] == ["blue"]
    plain = tiny.edit(photos[:1], ["my own plan"])
    assert difference(plain[0].image, results[0].image) <= 1


def test_a_designers_answer_is_tidied_and_must_be_a_blueprint(tiny, photos):
    wild = "Sure!\n" + re.sub(r"^(\d\. [\w ]+:)", r"**\1**", BLUEPRINT, flags=re.MULTILINE)
    assert "**3. Local Object Perception:** A red" in wild
    [result] = tiny.edit(photos[:1], ["remove it"], designer=Recorded(wild))
    assert result.blueprint == BLUEPRINT
    with pytest.raises(DesignerError, match="answer to 'remove it' is no blueprint"):
        tiny.edit(photos[:1], ["remove it"], designer=Recorded("I cannot."))
    with pytest.raises(DesignerError, match="no answer"):
        tiny.edit(photos[:1], ["remove it"], designer=Recorded(DesignerError("no answer")))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ("oracle", "not 'oracle'"),
        ("", "not ''"),
        (Recorded, "not the class Recorded"),
        (["self"], "not a list"),
    ],
)
def test_what_is_no_designer_is_refused_before_anything_is_asked(tiny, photos, wrong, named):
    with pytest.raises(
        InputError, match=r"such as dim\.designers\.create\('oracle'\) gives"
    ) as error:
        tiny.edit(photos[:1], ["remove it"], blueprints=["my own plan"], designer=wrong)
    assert str(error.value).endswith(named)


def test_another_model_becomes_a_designer_first(tiny, photos, monkeypatch):
    with pytest.raises(InputError, match=r"not a DIM, of which .*\.SelfDesigner makes one"):
        tiny.edit(photos[:1], ["remove it"], designer=tiny)
    monkeypatch.setattr(tiny.conditioner, "generate", lambda *_: [BLUEPRINT])
    [result] = tiny.edit(photos[:1], ["remove it"], designer=SelfDesigner(tiny))
    assert result.blueprint == BLUEPRINT


def test_a_designer_that_answers_too_little_is_named(tiny, photos):
    class Short(Recorded):
        def design(self, requests, *, on_answer=None):
            return super().design(requests[:1])

    with pytest.raises(DesignerError, match="the designer answered 1 of 2 requests"):
        tiny.edit(photos[:2], ["remove it", "blue"], designer=Short(BLUEPRINT, BLUEPRINT))


def test_the_model_designs_with_its_own_eyes(tiny, photos, monkeypatch):
    passes, asked = [], []
    see = tiny.conditioner.see

    def answer(requests, images, max_new_tokens, on_text=None):
        asked.append((list(requests), len(images.features), max_new_tokens))
        return [BLUEPRINT for _ in requests]

    monkeypatch.setattr(tiny.conditioner, "see", lambda i: passes.append(len(i)) or see(i))
    monkeypatch.setattr(tiny.conditioner, "generate", answer)
    results = tiny.edit(photos[:2], ["remove it", "blue"], designer="self")
    assert [r.blueprint for r in results] == [BLUEPRINT] * 2
    assert asked == [(["remove it", "blue"], 2, 192)]
    assert passes == [2]


def test_without_a_template_the_general_request_is_asked(tiny, photos, monkeypatch):
    section = tiny.config.understanding.model_copy(update={"design_request": None})
    config = tiny.config.model_copy(update={"understanding": section})
    asked = []
    monkeypatch.setattr(tiny, "config", config)
    monkeypatch.setattr(
        tiny.conditioner, "generate", lambda requests, *_: asked.extend(requests) or ["x"]
    )
    assert tiny.design(photos[:1], ["turn it green"]) == ["x"]
    assert "turn it green" in asked[0] and "Global Layout" in asked[0]


def test_texts_are_painted_at_the_size_asked_for(tiny):
    images = tiny.generate(["a red circle", "two squares"], size=(96, 32), seeds=[1, 2])
    assert [image.size for image in images] == [(96, 32)] * 2
    assert tiny.generate(["a red circle"])[0].size == (64, 64)
    [alone] = tiny.generate(["two squares"], size=(96, 32), seeds=[2])
    assert difference(alone, images[1]) <= 1


def test_all_of_a_source_is_painted_in_its_own_shape_and_size(tiny, photos, monkeypatch):
    latents = []
    encode = tiny.autoencoder.encode
    monkeypatch.setattr(
        tiny.autoencoder, "encode", lambda p: latents.append(encode(p)) or latents[-1]
    )
    strip = Image.new("RGB", (900, 9), "red")
    results = tiny.edit([*photos, strip], ["remove it"] * 5)
    assert [r.image.size for r in results] == [*(p.size for p in photos), (900, 9)]
    # of 64 px: 64x64, 80x48 (3:2), 64x64 (4:5 is 60x68), 80x48 (13:7 is 84x44), 128x32 (4:1)
    assert [tuple(latent.shape) for latent in latents] == [
        (2, 8, 8, 8),
        (2, 8, 6, 10),
        (1, 8, 4, 16),
    ]


def test_the_middle_square_can_be_edited_as_published(tiny, photos):
    wide = tiny.edit(photos[1:2], ["remove it"], fit="square")[0].image
    assert wide.size == (64, 64)
    other = photos[1].copy()
    other.paste("red", (0, 0, 96, 10))
    changed = tiny.edit([other], ["remove it"], fit="square")[0].image
    assert difference(changed, wide) > 0
    square = [tiny.edit(photos[:1], ["remove it"], fit=f)[0].image for f in ("square", "source")]
    assert difference(*square) == 0


def test_a_negative_prompt_steers_its_row_alone(tiny, photos):
    told = ["remove it", "a longer instruction than the first"]
    guided = {"guidance_scale": 4.5}
    plain = tiny.edit(photos[:2], told, **guided)
    away = [None, "a blurred picture of nothing in particular"]
    steered = tiny.edit(photos[:2], told, negative_prompt=away, **guided)
    assert difference(steered[0].image, plain[0].image) <= 1
    assert difference(steered[1].image, plain[1].image) > 1
    alone = tiny.edit(photos[1:2], told[1:], negative_prompt=away[1], **guided)
    assert difference(steered[1].image, alone[0].image) <= 1
    unguided = [
        tiny.edit(photos[:1], told[:1], guidance_scale=1, negative_prompt=n)[0].image
        for n in (None, "blur")
    ]
    assert difference(*unguided) == 0
    one = tiny.generate(["a red circle"], **guided)[0]
    assert difference(tiny.generate(["a red circle"], negative_prompt="blue", **guided)[0], one) > 1


def test_every_step_can_be_watched(tiny, photos):
    seen = []

    def watch(progress):
        seen.append((progress.numbers, progress.step, progress.steps, progress.previews()))

    results = tiny.edit(photos[:2], ["remove it"] * 2, steps=2, on_step=watch)
    assert [s[:3] for s in seen] == [((n,), step, 2) for n in (0, 1) for step in (1, 2)]
    assert [s[3][0].size for s in seen] == [(64, 64)] * 2 + [(96, 64)] * 2
    # after the last step the guess is the result
    for (*_, previews), result in zip(seen[1::2], results, strict=True):
        assert difference(previews[0], result.image) <= 1
    assert difference(seen[0][3][0], results[0].image) > 1

    seen.clear()
    tiny.generate(["a", "b", "c"], steps=1, batch_size=2, on_step=watch)
    assert [s[:3] for s in seen] == [((0, 1), 1, 1), ((2,), 1, 1)]


def test_another_solver_is_a_matter_of_configuration(tiny, photos, monkeypatch):
    plain = tiny.edit(photos[:1], ["remove it"])[0].image
    sampling = tiny.config.sampling
    assert (sampling.solver, sampling.fit) == ("dpm", "source")
    euler = sampling.model_copy(update={"solver": "euler"})
    monkeypatch.setattr(tiny, "config", tiny.config.model_copy(update={"sampling": euler}))
    assert difference(tiny.edit(photos[:1], ["remove it"])[0].image, plain) > 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda d, p: d.edit([], []), "nothing to paint"),
        (lambda d, p: d.edit(p[:1], []), "1 images came with 0 instructions"),
        (lambda d, p: d.edit(p[:1], ["a"], seeds=[1, 2]), "1 images came with 2 seeds"),
        (lambda d, p: d.edit(p[:1], ["a"], guidance_scale=[]), "0 guidance scales"),
        (lambda d, p: d.edit(p[:1], [""]), "the prompt is empty"),
        (lambda d, p: d.edit(p[:1], ["a"], blueprints=[""]), "the prompt is empty"),
        (lambda d, p: d.edit(p[:1], [" "], designer="self"), "the instruction is empty"),
        (lambda d, p: d.edit([p[0], "x"], ["a", "b"]), "image 2 must be a PIL image"),
        (lambda d, p: d.edit(p[:1], ["a"], steps=0), "at least 1 step"),
        (lambda d, p: d.edit(p[:1], ["a"], batch_size=0), "batch size"),
        (lambda d, p: d.edit(p[:1], ["a"], fit="crop"), "'crop' is not one of source, square"),
        (lambda d, p: d.edit(p[:1], ["a"], negative_prompt=[]), "0 negative prompts"),
        (lambda d, p: d.edit(p[:1], ["a"], negative_prompt=" "), "the prompt is empty"),
        (lambda d, p: d.generate(["a"], size=(65, 64)), "65x64 does not divide"),
        (lambda d, p: d.generate(["a"], size=(72, 64)), "cells of 16x16"),
        (lambda d, p: d.save("x", understanding="link"), "'copy' or 'reference'"),
        (lambda d, p: d.save("x", understanding="reference"), "loaded from nowhere"),
    ],
)
def test_what_cannot_be_painted_is_refused(tiny, photos, call, message):
    with pytest.raises(InputError, match=message):
        call(tiny, photos)


def test_a_saved_model_paints_the_same(tiny, saved, photos):
    loaded = model.load(saved)
    for mine, theirs in zip(tiny.parameters(), loaded.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    told = ["remove it", "blue"]
    for one, other in zip(tiny.edit(photos[:2], told), loaded.edit(photos[:2], told), strict=True):
        assert difference(one.image, other.image) == 0
    assert loaded.config == tiny.config
    assert {p.name for p in saved.iterdir()} == {
        "autoencoder",
        "connector.safetensors",
        "dim.json",
        "null_condition.safetensors",
        "painter",
        "understanding",
    }


def test_a_model_can_refer_to_its_understanding_model(saved, tmp_path, photos):
    loaded = model.load(saved)
    loaded.save(tmp_path / "light", understanding="reference")
    assert not (tmp_path / "light" / "understanding").exists()
    again = model.load(tmp_path / "light")
    assert again.understanding_source == str(saved / "understanding")
    assert torch.equal(*(m.conditioner.encode(["a"], photos[:1])[0] for m in (loaded, again)))


def test_an_understanding_model_that_is_gone_or_another_is_not_loaded(saved, tmp_path, monkeypatch):
    loaded = model.load(saved)
    place = tmp_path / "qwen"
    shutil.copytree(saved / "understanding", place)
    loaded.understanding_source = str(place)
    loaded.save(tmp_path / "light", understanding="reference")
    weights = place / "model.safetensors"
    held = bytearray(weights.read_bytes())
    held[-1] ^= 1
    weights.write_bytes(held)
    message = f"{tmp_path}/light refers to the understanding model {place}, which is another one"
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path / "light")
    place.rename(tmp_path / "away")
    message = f"light refers to an understanding model: {place} is not there$"
    with pytest.raises(CheckpointError, match=message):
        model.load(tmp_path / "light")
    # The same from the hub, whose files lie in a cache; away from it there is nothing to compare.
    loaded.understanding_source = "somebody/qwen"
    loaded.save(tmp_path / "unknown", understanding="reference")
    assert json.loads((tmp_path / "unknown" / "dim.json").read_text())["fingerprint"] is None
    monkeypatch.setattr(reference, "snapshot_download", lambda *_, **__: tmp_path / "away")
    loaded.save(tmp_path / "hub", understanding="reference")
    description = read_description(tmp_path / "hub")
    assert description.fingerprint == reference.fingerprint(str(tmp_path / "away"))
    (tmp_path / "away" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="somebody/qwen, which is another one"):
        model.load(tmp_path / "hub")


def test_the_type_can_be_chosen_and_stays(saved, tmp_path, photos):
    half = model.load(saved, dtype="bfloat16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    half.save(tmp_path / "half")
    assert {p.dtype for p in model.load(tmp_path / "half").parameters()} == {torch.bfloat16}
    assert half.edit(photos[:1], ["remove it"])[0].image.size == (64, 64)
    with pytest.raises(InputError, match="no floating type"):
        model.load(saved, dtype="int8")


def test_saving_replaces_a_model_and_nothing_else(saved, tmp_path):
    dim = model.load(saved)
    for _ in range(2):
        dim.save(tmp_path / "deep" / "model")
    assert os.listdir(tmp_path / "deep") == ["model"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a DIM folder"):
        dim.save(tmp_path / "mine")
    assert os.listdir(tmp_path / "mine") == ["letter.txt"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        dim.save(tmp_path / "file" / "model")


def test_a_text_to_image_model_widens_and_remembers(tiny_config, tmp_path, photos):
    section = tiny_config.painter.model_copy(update={"source_latent": False})
    dim = model.build(tiny_config.model_copy(update={"painter": section}))
    with pytest.raises(InputError, match="text-to-image and cannot edit"):
        dim.edit(photos[:1], ["remove it"])
    before = dim.generate(["a red circle"])[0]
    dim.save(tmp_path / "t2i")
    dim.painter.widen()
    assert difference(dim.generate(["a red circle"])[0], before) <= 1
    dim.save(tmp_path / "edit")
    loaded = model.load(tmp_path / "edit")
    assert loaded.painter.takes_source and loaded.config.painter.source_latent
    assert not model.load(tmp_path / "t2i").painter.takes_source
    # a configuration that wants an edit painter widens text-to-image weights itself
    weights = {"weights": str(tmp_path / "t2i" / "painter")}
    started = model.build(
        tiny_config.model_copy(update={"painter": tiny_config.painter.model_copy(update=weights)})
    )
    assert started.painter.takes_source
    assert torch.equal(started.painter.null_condition, dim.painter.null_condition)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "model folder not found"),
        (lambda p: (p / "dim.json").unlink(), "is not a DIM folder"),
        (lambda p: (p / "dim.json").write_text("{"), "dim.json is damaged"),
        (lambda p: (p / "dim.json").write_text('{"format": 1}'), "dim.json is damaged"),
        (lambda p: shutil.rmtree(p / "painter"), "incomplete: it lacks painter"),
        (lambda p: shutil.rmtree(p / "understanding"), "cannot load weights from .*understanding"),
        (
            lambda p: os.truncate(p / "understanding" / "model.safetensors", 5000),
            "cannot load weights from .*understanding",
        ),
        (
            lambda p: os.truncate(p / "painter" / "diffusion_pytorch_model.safetensors", 5000),
            "cannot load weights from .*painter",
        ),
        (
            lambda p: (p / "connector.safetensors").write_bytes(b"x"),
            "cannot load weights from .*connector",
        ),
    ],
)
def test_a_damaged_folder_is_named(saved, tmp_path, damage, message):
    folder = shutil.copytree(saved, tmp_path / "copy")
    damage(folder)
    with pytest.raises(CheckpointError, match=message) as error:
        model.load(folder)
    assert "\n" not in str(error.value)


def test_trained_weights_that_are_no_numbers_are_refused(tiny_config, tmp_path):
    dim = model.build(tiny_config)
    with torch.no_grad():
        dim.painter.network.proj_out.bias[0] = float("inf")
    dim.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"not finite: network\.proj_out\.bias"):
        model.load(tmp_path / "model")


def test_a_folder_of_a_later_format_is_refused(saved, tmp_path):
    folder = shutil.copytree(saved, tmp_path / "copy")
    description = json.loads((folder / "dim.json").read_text())
    (folder / "dim.json").write_text(json.dumps(description | {"format": 99}))
    with pytest.raises(CheckpointError, match="format 99"):
        model.load(folder)


def test_a_tensor_that_is_missing_from_frozen_weights_is_named(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(saved, tmp_path / "copy")
    file = folder / "understanding" / "model.safetensors"
    tensors = load_file(file)
    gone = next(key for key in tensors if "layers.1.mlp.up_proj" in key)
    del tensors[gone]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing .*layers\.1\.mlp\.up_proj\.weight"):
        model.load(folder)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("connector.out_features=48", "out_features is 48 but .*caption_channels is 96"),
        ("autoencoder.architecture.latent_channels=16", "latent_channels is 16 but"),
        ("painter.null_condition_tokens=10", "null_condition_tokens must be at least"),
        ("understanding.design_request=hello", "must contain {instruction}"),
        ("sampling.guidance_scale=0.5", "guidance_scale"),
        ("painter.depth=3", "unknown key 'painter.depth'"),
    ],
)
def test_a_wrong_configuration_names_its_keys(override, message):
    from pathlib import Path

    tiny_yaml = Path(__file__).resolve().parents[3] / "configs" / "tiny.yaml"
    with pytest.raises(ConfigError, match=message):
        load_config(ModelConfig, tiny_yaml, [override])


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("painter", {"num_heads": 3}, "painter.architecture: .*num_heads"),
        ("autoencoder", {"depth": 3}, "autoencoder.architecture: .*depth"),
    ],
)
def test_an_architecture_that_is_none_names_its_section(tiny_config, section, change, message):
    part = getattr(tiny_config, section)
    wrong = part.model_copy(update={"architecture": {**part.architecture, **change}})
    with pytest.raises(ConfigError, match=message):
        model.build(tiny_config.model_copy(update={section: wrong}))


def test_weights_that_the_package_lacks_are_named(tiny_config):
    part = tiny_config.understanding.model_copy(update={"weights": "package:tiny/giant"})
    with pytest.raises(CheckpointError, match="no weights 'package:tiny/giant'"):
        model.build(tiny_config.model_copy(update={"understanding": part}))


def test_the_large_configuration_has_the_published_painter():
    from pathlib import Path

    from diffusers import SanaTransformer2DModel

    from dim.model.painter import Painter

    config = load_config(
        ModelConfig, Path(__file__).resolve().parents[3] / "configs" / "dim-4.6b.yaml"
    )
    with torch.device("meta"):
        network = SanaTransformer2DModel(**config.painter.architecture)
        painter = Painter(network, torch.empty(8192, 2304))
        painter.widen()
    assert sum(p.numel() for p in network.parameters()) == 1_604_713_632


def test_each_part_may_have_a_type_of_its_own(saved, tmp_path, tiny_config):
    half = model.load(saved, dtype="float16")
    half.save(tmp_path / "half")
    sections = {
        name: getattr(tiny_config, name).model_copy(
            update={"weights": str(tmp_path / "half" / name), "dtype": dtype}
        )
        for name, dtype in (
            ("understanding", "float32"),
            ("painter", "bfloat16"),
            ("autoencoder", None),
        )
    }
    dim = model.build(tiny_config.model_copy(update=sections))
    assert dim.conditioner.model.dtype == torch.float32
    assert {p.dtype for p in dim.painter.parameters()} == {torch.bfloat16}
    assert dim.autoencoder.network.dtype == torch.float16
    assert {p.dtype for p in dim.connector.parameters()} == {torch.float32}
