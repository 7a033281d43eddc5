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


def cut(image: Image.Image, thing: Thing, half: float) -> Image.Image:
    """``image`` with a notch of ``half`` a turn's share to each side, pointing right."""
    pixels, bare = (np.asarray(i).copy() for i in (image, tabletop.render(Scene(()), image.size)))
    rows, columns = np.mgrid[: image.height, : image.width] + 0.5
    x, y = columns / image.width - thing.x, rows / image.height - thing.y
    notch = (np.abs(np.arctan2(y, x)) < np.pi * half) & (np.hypot(x, y) < 1.3 * thing.radius)
    pixels[notch] = bare[notch]
    return Image.fromarray(pixels)


def test_a_circle_with_a_notch_is_exact_but_not_strictly() -> None:
    whole = tabletop.render(SCENE, 64)
    for half, strict in ((0.0, True), (0.1, True), (0.25, False)):
        notched = cut(whole, RED, half)
        assert tabletop.exact(notched, SCENE)
        assert tabletop.exact_strictly(notched, SCENE, SCENE) == strict
    judged = tabletop.judge(cut(whole, RED, 0.25), SCENE)
    assert judged.overlap == pytest.approx(0.75, abs=0.03) and not judged.strict


def test_a_ragged_square_is_exact_but_not_strictly() -> None:
    scene = Scene((Thing("square", "blue", "large", 0.5, 0.5),))
    pixels = np.asarray(tabletop.render(scene, 64)).copy()
    bare = np.asarray(tabletop.render(Scene(()), 64))
    for row in range(20, 46, 4):
        pixels[row : row + 2, 32:46] = bare[row : row + 2, 32:46]
    ragged = Image.fromarray(pixels)
    assert tabletop.exact(ragged, scene) and not tabletop.exact_strictly(ragged, scene)


def test_more_than_a_thing_is_as_wrong_as_less() -> None:
    scene = Scene((Thing("square", "blue", "large", 0.5, 0.5),))
    pixels = np.asarray(tabletop.render(scene, 64)).copy()
    pixels[22:42:4, 20:44] = pixels[32, 32]  # bristles on both sides
    bristly = Image.fromarray(pixels)
    whole = tabletop.judge(tabletop.render(scene, 64), scene)
    assert whole.overlap == 1 and tabletop.judge(bristly, scene).overlap < 0.9


def test_a_thing_beside_another_does_not_count_for_it() -> None:
    near = Scene((RED, Thing("circle", "orange", "large", 0.69, 0.3)))
    assert tabletop.judge(tabletop.render(near, 64), near).overlap == 1
    assert tabletop.judge(tabletop.render(near.without(RED), 64), near).overlap == 0


def test_what_should_stay_must_not_change() -> None:
    edit = SCENE.without(BLUE)
    right = tabletop.render(edit, 64)
    assert tabletop.judge(right, edit, SCENE) == tabletop.Judgement(True, 1.0, 0.0)
    darker = Image.fromarray(np.clip(np.asarray(right, int) - 14, 0, 255).astype(np.uint8))
    assert tabletop.exact(darker, edit) and not tabletop.exact_strictly(darker, edit, SCENE)
    assert tabletop.judge(darker, edit, SCENE).drift == pytest.approx(14 / 255, abs=0.005)
    assert tabletop.exact_strictly(darker, edit)  # painted from nothing, nothing had to stay
    moved = replace(edit, background="slate")
    assert tabletop.judge(tabletop.render(moved, 64), moved, SCENE).strict


@pytest.mark.parametrize("size", [64, 100, 256])
def test_the_target_itself_is_strictly_exact(size: int) -> None:
    edits = [tabletop.sample_edit(np.random.default_rng([13, i])) for i in range(60)]
    for edit in edits:
        judged = tabletop.judge(tabletop.render(edit.target, size), edit.target, edit.source)
        assert (judged.overlap, judged.drift) == (1, 0) and judged.strict == judged.exact
        assert not tabletop.judge(
            tabletop.render(edit.source, size), edit.target, edit.source
        ).strict


def test_an_image_of_something_else_is_judged_without_error() -> None:
    blank = tabletop.judge(Image.new("L", (64, 64), 255), SCENE, SCENE)
    assert (blank.exact, blank.overlap, blank.strict) == (False, 0.0, False)
    assert tabletop.judge(Image.new("RGB", (64, 64), "white"), Scene((), "white")).strict
