from __future__ import annotations

import numpy as np
from PIL import Image

from dim import tabletop
from dim.blueprint import Blueprint, parse_answer
from dim.design import ReviewRequest
from dim.designers import DesignRequest, create, create_captioner
from dim.errors import DesignerError
from dim.images import encode_png
from dim.review import parse as parse_review


def pair(index: int) -> tuple[tabletop.Edit, bytes, bytes]:
    edit = tabletop.sample_edit(np.random.default_rng([11, index]))
    source, target = (tabletop.render(scene, 64) for scene in (edit.source, edit.target))
    return edit, encode_png(source), encode_png(target)


def test_plans_from_the_image_alone() -> None:
    pairs = [pair(index) for index in range(12)]
    replies = create("oracle").design(
        [DesignRequest(edit.instruction, source) for edit, source, _ in pairs]
    )
    for (edit, _, _), reply in zip(pairs, replies, strict=True):
        assert isinstance(reply, str)
        assert Blueprint.parse(reply).instruction == edit.blueprint.instruction
        assert reply.startswith("1. Edit Instruction:")


def test_triages_by_the_target() -> None:
    edits = [pair(index) for index in range(6)]
    requests = [DesignRequest(edit.instruction, source, target) for edit, source, target in edits]
    wrong = [DesignRequest(edit.instruction, source, source) for edit, source, _ in edits]
    designer = create("oracle")
    for reply in designer.design(requests):
        assert parse_answer(str(reply), instruction="").alignment == "aligned"
    for reply in designer.design(wrong):
        assert parse_answer(str(reply), instruction="").alignment == "misaligned"


def test_what_it_cannot_do_is_that_records_error() -> None:
    edit, source, _ = pair(0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    replies = create("oracle").design(
        [
            DesignRequest("Make it rain.", source),
            DesignRequest(edit.instruction, b"no image"),
            DesignRequest(edit.instruction, encode_png(tabletop_image(noise))),
            DesignRequest(edit.instruction, source),
        ]
    )
    assert all(isinstance(reply, DesignerError) for reply in replies[:3])
    assert isinstance(replies[3], str)


def test_captions_what_is_on_the_table() -> None:
    edit, source, _ = pair(3)
    (caption,) = create_captioner("oracle").caption([source])
    assert isinstance(caption, str)
    for thing in edit.source.objects:
        assert thing.colour in caption and thing.shape in caption


def tabletop_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


def test_a_noisy_oracle_errs_as_often_as_it_is_told_and_always_in_the_same_plans() -> None:
    rng = np.random.default_rng(5)
    kinds = ("add", "remove", "replace", "adjust", "background")
    edits = [tabletop.sample_edit(rng, kinds=kinds) for _ in range(60)]
    requests = [
        DesignRequest(edit.instruction, encode_png(tabletop.render(edit.source, 64)))
        for edit in edits
    ]
    right = [Blueprint.parse(str(reply)) for reply in create("oracle").design(requests)]
    for share, fewest, most in ((0, 0, 0), (0.3, 8, 28), (1, 60, 60)):
        replies = create(f"noisy:{share}").design(requests)
        plans = [Blueprint.parse(str(reply)) for reply in replies]
        wrong = [a.imagination != b.imagination for a, b in zip(plans, right, strict=True)]
        assert fewest <= sum(wrong) <= most
        assert [plan.instruction for plan in plans] == [plan.instruction for plan in right]
        assert [plan.local_objects for plan in plans] == [plan.local_objects for plan in right]
        assert create(f"noisy:{share}").design(requests[::-1]) == replies[::-1]


def test_where_there_is_one_edit_only_nobody_errs() -> None:
    thing = tabletop.Thing("circle", "red", "large", 0.5, 0.5)
    image = encode_png(tabletop.render(tabletop.Scene((thing,)), 64))
    request = DesignRequest("remove the red circle", image)
    assert create("noisy:1").design([request]) == create("oracle").design([request])


def test_it_accepts_what_the_checker_does() -> None:
    edit, source, target = pair(0)
    plan = edit.blueprint.render()
    good, bad, broken = create("oracle").review(  # type: ignore[attr-defined]
        [
            ReviewRequest(edit.instruction, plan, source, painted)
            for painted in (target, source, b"no image")
        ]
    )
    accepted, refused = (parse_review(reply, instruction="") for reply in (good, bad))
    assert accepted.accepted and accepted.score > 9 and not accepted.missing
    assert not refused.accepted and 0 < refused.score < 5
    assert tabletop.caption(edit.source) in refused.missing
    assert isinstance(broken, DesignerError) and "the painted image" in str(broken)
