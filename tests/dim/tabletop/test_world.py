"""Scenes: drawn by seed, without overlap, the same at every resolution."""

from __future__ import annotations

import numpy as np
import pytest

from dim import tabletop
from dim.errors import InputError
from dim.tabletop import Scene, Thing
from dim.tabletop.world import fits


def test_the_world_has_the_promised_variety() -> None:
    assert len(tabletop.SHAPES) >= 4
    assert len(tabletop.COLOURS) >= 8
    assert len(tabletop.SIZES) == 2
    assert len(tabletop.BACKGROUNDS) >= 3


def test_scenes_are_drawn_by_seed_alone() -> None:
    scenes = [tabletop.sample_scene(np.random.default_rng([5, i])) for i in range(40)]
    again = [tabletop.sample_scene(np.random.default_rng([5, i])) for i in range(40)]
    assert scenes == again
    assert len(set(scenes)) == 40


def test_things_never_overlap_and_stay_inside() -> None:
    for i in range(100):
        scene = tabletop.sample_scene(np.random.default_rng([6, i]), objects=(5, 6))
        assert 5 <= len(scene.objects) <= 6
        for thing in scene.objects:
            assert fits(thing, [other for other in scene.objects if other != thing])


def test_a_scene_survives_json() -> None:
    scene = tabletop.sample_scene(np.random.default_rng(1))
    assert Scene.from_json(scene.to_json()) == scene
    with pytest.raises(InputError, match="not a tabletop scene"):
        Scene.from_json('{"objects": [{"shape": "circle"}]}')


def test_unknown_names_are_named() -> None:
    with pytest.raises(InputError, match="unknown shape 'cube'"):
        Scene((Thing("cube", "red", "small", 0.5, 0.5),))
    with pytest.raises(InputError, match="unknown background 'lava'"):
        Scene((), "lava")


def test_rendering_does_not_depend_on_resolution() -> None:
    scene = tabletop.sample_scene(np.random.default_rng(3))
    large = tabletop.render(scene, 512).resize((64, 64), resample=4)
    small = tabletop.render(scene, 64)
    difference = np.abs(np.asarray(large, float) - np.asarray(small, float)).mean()
    assert difference < 3


def test_edges_are_anti_aliased() -> None:
    scene = Scene((Thing("circle", "red", "large", 0.5, 0.5),), "white")
    colours = {tuple(pixel) for pixel in np.asarray(tabletop.render(scene, 64)).reshape(-1, 3)}
    assert len(colours) > 5


def test_any_shape_of_image() -> None:
    scene = Scene((Thing("square", "blue", "large", 0.5, 0.5),))
    assert tabletop.render(scene, (96, 48)).size == (96, 48)
    with pytest.raises(InputError, match="0x10"):
        tabletop.render(scene, (0, 10))
