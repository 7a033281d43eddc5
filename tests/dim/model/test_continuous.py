"""Samples that join and leave at any step become what they are alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dim.errors import InputError
from dim.model import DIM, continuous, sampler
from dim.model.continuous import ContinuousBatch, Denoising
from dim.model.paint import Painting
from dim.model.painter import Painter
from dim.model.sampler import Condition

SHAPES = [(8, 8), (8, 8), (4, 8), (6, 10), (2, 2)]


def told(rng: np.random.Generator) -> torch.Tensor:
    """A condition of 1 to 12 tokens, as many as the painter's null table has."""
    return torch.from_numpy(rng.standard_normal((1, rng.integers(1, 13), 24))).float()


def anything(rng: np.random.Generator) -> dict[str, Any]:
    """The arguments of a sample, drawn at random."""
    shape = (1, 4, *SHAPES[rng.integers(len(SHAPES))])
    noise = torch.from_numpy(rng.standard_normal(shape)).float()
    return {
        "noise": noise,
        "condition": told(rng),
        "negative": told(rng) if rng.random() < 0.4 else None,
        "source_latent": noise.flip(2) if rng.random() < 0.6 else None,
        "steps": int(rng.integers(1, 8)),
        "guidance_scale": float(rng.choice([1.0, 3.0, 7.5])),
        "solver": str(rng.choice(["dpm", "euler"])),
    }


def begin(painter: Painter, asked: dict[str, Any]) -> Denoising:
    said = dict(asked)
    negative = said.pop("negative")
    return continuous.begin(
        painter,
        said.pop("noise"),
        Condition(said.pop("condition"), None),
        negative=None if negative is None else Condition(negative, None),
        **said,
    )


def alone(painter: Painter, asked: dict[str, Any]) -> torch.Tensor:
    said = dict(asked)
    noise, condition = said.pop("noise"), said.pop("condition")
    said["negative_condition"] = said.pop("negative")
    return sampler.sample(painter, noise, condition, None, **said)


def through(batch: ContinuousBatch, rows: Sequence[Denoising], joins: Sequence[int]) -> int:
    """Let ``rows`` join before the steps ``joins`` and leave when done; how many steps it took."""
    waiting = sorted(zip(joins, rows, strict=True), key=lambda pair: pair[0])
    step = 0
    while waiting or batch.rows:
        while waiting and waiting[0][0] <= step:
            batch.join(waiting.pop(0)[1])
        assert batch.step() == {}
        for row in batch.rows:
            if row.done:
                batch.leave(row)
        step += 1
    return step


@pytest.fixture
def editor(painter: Painter) -> Painter:
    painter.widen()
    torch.nn.init.normal_(painter.network.patch_embed.proj.weight, std=0.3)
    return painter


@pytest.mark.parametrize("mixture", range(8))
def test_any_mixture_becomes_what_each_is_alone(editor: Painter, mixture: int) -> None:
    rng = np.random.default_rng(mixture)
    asked = [anything(rng) for _ in range(10)]
    rows = [begin(editor, one) for one in asked]
    through(ContinuousBatch(editor), rows, rng.integers(0, 8, len(rows)).tolist())
    for one, row in zip(asked, rows, strict=True):
        torch.testing.assert_close(row.latent, alone(editor, one), atol=1e-5, rtol=0)


def test_one_shape_is_one_pass_whatever_else_differs(editor: Painter) -> None:
    passes = []
    editor.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    rng = np.random.default_rng(3)
    asked = [{**anything(rng), "noise": torch.randn(1, 4, 4, 4), "source_latent": None}] * 6
    rows = [begin(editor, {**one, "steps": steps}) for steps, one in enumerate(asked, start=1)]
    assert through(ContinuousBatch(editor), rows, [0] * 6) == 6
    assert passes == [6, 5, 4, 3, 2, 1]


def test_a_sample_that_left_is_not_advanced_and_others_do_not_notice(editor: Painter) -> None:
    rng = np.random.default_rng(4)
    asked = [{**anything(rng), "steps": 4} for _ in range(3)]
    rows = [begin(editor, one) for one in asked]
    batch = ContinuousBatch(editor)
    for row in rows:
        batch.join(row)
    batch.step()
    batch.leave(rows[1])
    through(batch, [], [])
    assert [row.number for row in rows] == [4, 1, 4]
    for number in (0, 2):
        expected = alone(editor, asked[number])
        torch.testing.assert_close(rows[number].latent, expected, atol=1e-5, rtol=0)


class Limited(torch.nn.Module):
    """A painter with memory for ``most`` latents at once."""

    def __init__(self, painter: Painter, most: int) -> None:
        super().__init__()
        self.painter, self.most = painter, most
        self.passes: list[int] = []

    def forward(self, latent: torch.Tensor, *rest: object, **more: object) -> torch.Tensor:
        self.passes.append(len(latent))
        if len(latent) > self.most:
            raise torch.OutOfMemoryError("out of memory")
        return self.painter(latent, *rest, **more)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_pass_that_does_not_fit_is_halved_and_stays_so(editor: Painter, most: int) -> None:
    rng = np.random.default_rng(5)
    noise = torch.randn(8, 1, 4, 4, 4)
    asked = [{**anything(rng), "steps": 3, "noise": one, "source_latent": None} for one in noise]
    rows = [begin(editor, one) for one in asked]
    limited = Limited(editor, most)
    through(ContinuousBatch(limited), rows, [0] * 8)  # type: ignore[arg-type]
    for one, row in zip(asked, rows, strict=True):
        torch.testing.assert_close(row.latent, alone(editor, one), atol=1e-5, rtol=0)
    fits = [number for number in limited.passes if number <= most]
    assert sum(fits) == 8 * 3
    # only the first step tries what is too much
    assert len(limited.passes) - len(fits) == {1: 7, 2: 3, 3: 3}[most]


def test_only_what_fails_alone_fails(editor: Painter) -> None:
    rng = np.random.default_rng(6)
    rows = [begin(editor, {**anything(rng), "steps": 2}) for _ in range(7)]
    rows[3].source_latent = torch.zeros(1, 4, 1, 1)
    batch = ContinuousBatch(editor)
    for row in rows:
        batch.join(row)
    failed = batch.step()
    assert list(failed) == [rows[3]] and failed[rows[3]]
    assert [row.number for row in rows] == [1, 1, 1, 0, 1, 1, 1]
    assert rows[3] in batch.rows


def test_a_step_that_fails_after_the_pass_fails_alone(
    editor: Painter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(7)
    rows = [begin(editor, {**anything(rng), "steps": 2}) for _ in range(3)]
    monkeypatch.setattr(rows[1], "advance", lambda _: [][0])
    batch = ContinuousBatch(editor)
    for row in rows:
        batch.join(row)
    assert list(batch.step()) == [rows[1]]
    assert [row.number for row in rows] == [1, 0, 1]


@pytest.mark.parametrize(
    ("wrong", "said"), [({"steps": 0}, "at least 1 step"), ({"solver": "heun"}, "'heun' is not")]
)
def test_what_cannot_begin_is_refused(editor: Painter, wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        begin(editor, {**anything(np.random.default_rng(0)), **wrong})


def painted(model: DIM, paintings: Sequence[Painting], joins: Sequence[int]) -> list[Image.Image]:
    through(ContinuousBatch(model.painter), [one.denoising for one in paintings], joins)
    return [one.image() for one in paintings]


def test_images_are_the_same_to_the_bit_as_alone(tiny: DIM, photos: list[Image.Image]) -> None:
    """Edits of sources of several shapes and generations of several sizes, all at once."""
    edits: list[dict[str, Any]] = [
        {"seed": 5, "steps": 4, "guidance_scale": 1.0},
        {"seed": 6, "steps": 2, "guidance_scale": 7.5, "negative_prompt": "blurred, of no use"},
        {"seed": 7, "steps": 5, "guidance_scale": 3.0, "fit": "square"},
        {"seed": 8, "steps": 3, "guidance_scale": 4.5},
    ]
    generations: list[dict[str, Any]] = [
        {"size": (64, 32), "seed": 9, "steps": 3, "guidance_scale": 2.0},
        {"size": (16, 16), "seed": 1, "steps": 6, "guidance_scale": 1.0},
        {"size": (64, 64), "seed": 2, "steps": 1, "guidance_scale": 5.0, "negative_prompt": "red"},
    ]
    texts = [f"remove it {'and all that is beside it ' * number}" for number in range(7)]
    paintings = [
        *(tiny.begin_edit(*one, **how) for *one, how in zip(photos, texts[:4], edits, strict=True)),
        *(tiny.begin_generation(t, **how) for t, how in zip(texts[4:], generations, strict=True)),
    ]
    images = painted(tiny, paintings, [0, 1, 1, 2, 0, 3, 0])
    for photo, text, how, image in zip(photos, texts, edits, images, strict=False):
        seed = {"seeds": [how["seed"]]}
        options = {key: value for key, value in how.items() if key != "seed"}
        expected = tiny.edit([photo], [text], **seed, **options)[0].image
        assert np.array_equal(image, expected)
    for text, how, image in zip(texts[4:], generations, images[4:], strict=True):
        options = {key: value for key, value in how.items() if key != "seed"}
        expected = tiny.generate([text], seeds=[how["seed"]], **options)[0]
        assert np.array_equal(image, expected)


def test_a_preview_is_what_edit_reports_at_that_step(tiny: DIM, photos: list[Image.Image]) -> None:
    seen: list[Image.Image] = []
    tiny.edit(photos[1:2], ["remove it"], on_step=lambda step: seen.extend(step.previews()))
    painting = tiny.begin_edit(photos[1], "remove it")
    batch = ContinuousBatch(tiny.painter)
    batch.join(painting.denoising)
    for expected in seen:
        batch.step()
        assert np.array_equal(painting.preview(), expected)
    assert painting.preview().size == photos[1].size


def test_an_edit_begins_with_what_edit_checks(tiny: DIM, photos: list[Image.Image]) -> None:
    with pytest.raises(InputError, match="at least 1 step"):
        tiny.begin_edit(photos[0], "remove it", steps=0)
    with pytest.raises(InputError, match="fit 'all' is not one of"):
        tiny.begin_edit(photos[0], "remove it", fit="all")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="cells of 16x16"):
        tiny.begin_generation("a cup", size=(65, 64))
