from __future__ import annotations

from collections.abc import Sequence

import pytest
from PIL import Image

from dim.blueprint import Blueprint
from dim.design import Reply, ReviewRequest
from dim.errors import CallsStopped, DesignerError, InputError
from dim.images import decode_image
from dim.reflection import MAX_SEED, Reflection, Wanted, reflect, require_reviews
from dim.review import Review

SOURCE = Image.new("RGB", (8, 8), "white")
PLAN = "the first plan"
BETTER = Blueprint(*(f"{word} better." for word in ("Wish", "Layout", "Things", "Area", "End")))


class Reviewer:
    """Answers what it is given, round by round, and keeps what it was asked."""

    name = "reviewer"

    def __init__(self, *rounds: list[Reply] | CallsStopped) -> None:
        self.rounds = list(rounds)
        self.asked: list[list[ReviewRequest]] = []

    def review(self, requests: Sequence[ReviewRequest]) -> list[Reply]:
        self.asked.append(list(requests))
        answer = self.rounds.pop(0)
        if isinstance(answer, CallsStopped):
            raise answer
        return answer


def paint(wanted: Sequence[Wanted]) -> list[Image.Image]:
    """Images that tell their seed."""
    return [Image.new("RGB", (8, 8), (each.seed % 256, 0, 0)) for each in wanted]


def again(score: float, plan: str | None = None) -> str:
    return Review(False, score, "the end", plan).render()


def start(**numbers: int) -> Reflection[Image.Image]:
    return Reflection("wish", PLAN, 7, **numbers)


def test_one_round_of_one_image_asks_nobody() -> None:
    reviewer, reflection = Reviewer(), start()
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert best.wanted == Wanted(PLAN, 7) and best.review is None and best.error is None
    assert reviewer.asked == [] and reflection.wanted == ()


def test_it_is_painted_again_from_the_better_plan_until_it_is_accepted() -> None:
    accepted = Review(True, 9).render()
    reviewer = Reviewer([again(2, BETTER.render())], [accepted])
    reflection = start(rounds=4)
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert [each.wanted for each in reflection.candidates] == [
        Wanted(PLAN, 7),
        Wanted(BETTER.render(), 8),
    ]
    assert best is reflection.candidates[1] and best.round == 2
    (first,), (second,) = reviewer.asked
    assert (first.instruction, first.plan, second.plan) == ("wish", PLAN, BETTER.render())
    assert decode_image(first.image).getpixel((0, 0)) == (255, 255, 255)
    assert decode_image(first.painted).getpixel((0, 0)) == (7, 0, 0)


def test_without_a_new_plan_other_noise_is_tried_and_the_best_is_taken() -> None:
    reviewer = Reviewer([again(4)], [again(6)], [again(5)])
    reflection = start(rounds=3)
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert [each.wanted for each in reflection.candidates] == [Wanted(PLAN, s) for s in (7, 8, 9)]
    assert best.wanted.seed == 8
    assert "6.0 of 10, to be painted again: the end" in str(best)


def test_of_several_the_accepted_one_is_taken_however_high_the_others_are() -> None:
    reviewer = Reviewer([again(9), Review(True, 6).render(), Review(True, 6).render()])
    reflection = start(rounds=2, candidates=3)
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert best.wanted.seed == 8 and len(reflection.candidates) == 3


def test_the_leading_ones_plan_is_the_next() -> None:
    reviewer = Reviewer([again(3), again(5, BETTER.render())], [again(1), again(1)])
    reflection = start(rounds=2, candidates=2)
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert {each.wanted.plan for each in reflection.candidates[2:]} == {BETTER.render()}
    assert best.wanted.seed == 8


@pytest.mark.parametrize(
    ("reply", "said"),
    [
        ("It is nice.", "the review cannot be read"),
        (DesignerError("the server said 500"), "the server said 500"),
        (CallsStopped("the budget is spent"), "the budget is spent"),
    ],
)
def test_without_a_review_it_ends_and_nothing_is_lost(reply: Reply, said: str) -> None:
    stopped = isinstance(reply, CallsStopped)
    reviewer = Reviewer([again(4)], reply if stopped else [reply])  # type: ignore[arg-type]
    reflection = start(rounds=4)
    best = reflect(paint, reviewer, SOURCE, reflection)
    assert best.wanted.seed == 7 and len(reflection.candidates) == 2
    assert said in (reflection.candidates[1].error or "") and said in str(reflection.candidates[1])


def test_one_review_that_failed_leaves_the_others() -> None:
    reviewer = Reviewer(["rubbish", again(2)], [again(1), again(3)])
    reflection = start(rounds=2, candidates=2)
    assert reflect(paint, reviewer, SOURCE, reflection).wanted.seed == 10


def test_seeds_begin_anew_after_the_last() -> None:
    reflection: Reflection[Image.Image] = Reflection("wish", PLAN, MAX_SEED, candidates=2)
    assert [each.seed for each in reflection.wanted] == [MAX_SEED, 0]


@pytest.mark.parametrize("numbers", [{"rounds": 0}, {"rounds": 5}, {"candidates": 11}])
def test_numbers_have_bounds(numbers: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be 1 to"):
        start(**numbers)


@pytest.mark.parametrize(("designer", "name"), [("self", "self"), (None, "none")])
def test_who_cannot_look_is_refused(designer: object, name: str) -> None:
    with pytest.raises(InputError, match=f"the designer {name} cannot look"):
        require_reviews(designer)
