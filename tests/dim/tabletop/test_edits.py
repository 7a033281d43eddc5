"""Edits: every kind, direct and referential, with a target and a blueprint that agree."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from dim import tabletop
from dim.blueprint import Blueprint
from dim.errors import InputError
from dim.tabletop import KINDS, PLACES, Edit, Scene, Thing
from dim.tabletop.world import fits

RED = Thing("circle", "red", "large", 0.2, 0.3)
BLUE = Thing("square", "blue", "small", 0.8, 0.55)
GREEN = Thing("square", "green", "small", 0.25, 0.75)
SCENE = Scene((RED, BLUE, GREEN))


def edits(count: int = 300) -> list[Edit]:
    return [tabletop.sample_edit(np.random.default_rng([21, i])) for i in range(count)]


def target(instruction: str, scene: Scene = SCENE) -> Scene:
    return tabletop.understand(scene, instruction).target


def test_every_kind_is_drawn_and_changes_the_scene() -> None:
    drawn = edits()
    assert {edit.kind for edit in drawn} == set(KINDS)
    assert all(edit.source != edit.target for edit in drawn)
    assert {edit.referential for edit in drawn if edit.kind == "remove"} == {True, False}
    assert all(edit.referential for edit in drawn if edit.kind == "count")


def test_an_instruction_alone_gives_the_edit_back() -> None:
    for edit in edits():
        assert tabletop.understand(edit.source, edit.instruction) == edit


def test_a_blueprint_is_in_the_papers_grammar() -> None:
    for edit in edits(50):
        text = edit.blueprint.render()
        assert Blueprint.parse(text) == edit.blueprint
        assert text.startswith(f"1. Edit Instruction: {edit.instruction}")


def test_edits_are_drawn_by_seed_alone() -> None:
    assert edits(30) == edits(30)


def test_kinds_and_shares_are_obeyed() -> None:
    drawn = [
        tabletop.sample_edit(np.random.default_rng(i), kinds=["move"], referential=0.0)
        for i in range(20)
    ]
    assert {(edit.kind, edit.referential) for edit in drawn} == {("move", False)}
    with pytest.raises(InputError, match="unknown kinds of edit .*'paint'"):
        tabletop.sample_edit(np.random.default_rng(0), kinds=["paint"])


def test_operations_do_what_they_say() -> None:
    top_right = PLACES["top right"]
    assert target("remove the red circle") == Scene((BLUE, GREEN))
    assert target("extract the red circle") == Scene((RED,), "white")
    assert target("change the background to slate") == Scene((RED, BLUE, GREEN), "slate")
    assert target("draw all objects as outlines").style == "outline"
    assert target("move the red circle to the top right") == Scene(
        (RED.at(*top_right), BLUE, GREEN)
    )
    assert (
        Thing("star", "pink", "small", *top_right)
        in target("Add a small pink star at the top right.").objects
    )
    assert target("make the blue square red and then remove the green square") == Scene(
        (RED, Thing("square", "red", "small", 0.8, 0.55))
    )


def test_referential_instructions_are_resolved() -> None:
    assert target("remove the rightmost object") == Scene((RED, GREEN))
    assert target("remove the largest object left of the blue square") == Scene((BLUE, GREEN))
    assert target("remove the object closest to the red circle") == Scene((RED, BLUE))
    assert len(target("make as many circles as there are squares").objects) == 4
    assert len(target("make as many squares as there are circles").objects) == 2


@pytest.mark.parametrize(
    ("instruction", "message"),
    [
        ("remove the purple star", "0 objects"),
        ("remove the only square", "2 objects"),
        ("make the red circle red", "already"),
        ("change the background to wood", "already"),
        ("add a large pink star left of the red circle", "no room"),
        ("sing a song", "not an instruction"),
        ("", "not an instruction"),
    ],
)
def test_what_cannot_be_done_says_why(instruction: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        tabletop.understand(SCENE, instruction)


def test_what_grows_no_larger_has_its_room() -> None:
    """Places that are read off an image are a little off."""
    over = Thing("star", "orange", "large", 0.69, 0.83)
    scene = Scene((over, Thing("circle", "red", "small", 0.3, 0.3)), "marble")
    assert not fits(over, scene.objects[1:])
    for instruction, changed in (
        ("replace the orange star with a blue circle", {"colour": "blue", "shape": "circle"}),
        ("make the orange star green", {"colour": "green"}),
        ("make the orange star small", {"size": "small"}),
    ):
        target = tabletop.understand(scene, instruction).target
        assert dataclasses.replace(over, **changed) in target.objects
    with pytest.raises(InputError, match="no room on the table"):
        edge = Scene((Thing("star", "orange", "small", 0.9, 0.9),), "marble")
        tabletop.understand(edge, "make the orange star large")


def test_captions_list_everything() -> None:
    caption = tabletop.caption(SCENE)
    assert caption.startswith("A wood table with 3 objects.")
    for thing in SCENE.objects:
        assert f"{thing.size} {thing.colour} {thing.shape}, {thing.place}" in caption
