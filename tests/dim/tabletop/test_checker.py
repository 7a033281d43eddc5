"""The checker reads what is there, and sees every way in which an image can be wrong."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from dim import tabletop
from dim.tabletop import Scene, Thing

RED = Thing("circle", "red", "large", 0.3, 0.3)
BLUE = Thing("square", "blue", "small", 0.7, 0.65)
SCENE = Scene((RED, BLUE), "wood")


@pytest.mark.parametrize("size", [64, 100, 256])
def test_what_is_rendered_is_read(size: int) -> None:
    scenes = [tabletop.sample_scene(np.random.default_rng([11, i])) for i in range(40)]
    read = [tabletop.exact(tabletop.render(scene, size), scene) for scene in scenes]
    assert sum(read) >= 39


def test_a_soft_image_is_still_read() -> None:
    soft = tabletop.render(SCENE, 64).filter(ImageFilter.GaussianBlur(0.6))
    assert tabletop.exact(soft, SCENE)


@pytest.mark.parametrize(
    "wrong",
    [
        SCENE.without(BLUE),
        SCENE.having(Thing("star", "green", "small", 0.2, 0.8)),
        replace(SCENE, background="slate"),
        replace(SCENE, style="outline"),
        Scene((replace(RED, colour="orange"), BLUE)),
        Scene((replace(RED, shape="star"), BLUE)),
        Scene((replace(RED, size="small"), BLUE)),
        Scene((RED.at(0.3, 0.42), BLUE)),
    ],
)
def test_every_difference_counts(wrong: Scene) -> None:
    assert not tabletop.exact(tabletop.render(wrong, 64), SCENE)
    assert tabletop.exact(tabletop.render(wrong, 64), wrong)


def test_a_smudge_where_a_thing_was_is_seen() -> None:
    pixels = np.asarray(tabletop.render(SCENE.without(RED), 64)).copy()
    pixels[12:26, 12:26] = (120, 190, 120)
    assert not tabletop.exact(Image.fromarray(pixels), SCENE.without(RED))
    ghost = Image.blend(tabletop.render(SCENE.without(RED), 64), tabletop.render(SCENE, 64), 0.8)
    assert not tabletop.exact(ghost, SCENE.without(RED))


def test_noise_and_blank_images_are_read_without_error() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    assert not tabletop.exact(Image.fromarray(noise), SCENE)
    assert tabletop.read(Image.new("L", (64, 64), 255)).scene == Scene((), "white")


def test_a_copy_of_the_source_scores_nothing() -> None:
    edits = [tabletop.sample_edit(np.random.default_rng([12, i])) for i in range(60)]
    copies = [tabletop.exact(tabletop.render(e.source, 64), e.target) for e in edits]
    assert not any(copies)
