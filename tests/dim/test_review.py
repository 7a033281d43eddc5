from __future__ import annotations

import json
from typing import Any

import pytest

from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from dim.review import BEST, SCHEMA, Review, parse, request_prompt

WISH = "remove the cup"
PLAN = Blueprint(
    "Remove the red cup.",
    "A table with a cup and a plate.",
    "A red cup with a handle; a white plate.",
    "The cup on the left; the plate stays.",
    "The table with the plate alone.",
).render()
SECTIONS = dict(
    zip(
        list(SCHEMA["properties"])[3:],
        (part.partition(": ")[2] for part in PLAN.split("\n\n")),
        strict=True,
    )
)


def as_json(**changes: Any) -> str:
    values = {"missing": "The cup is there.", "score": 3, "verdict": "retry", **SECTIONS}
    return json.dumps(values | changes)


def as_text(missing: str = "The cup is there.", score: str = "3", verdict: str = "retry") -> str:
    return f"Missing: {missing}\nScore: {score}\nVerdict: {verdict}"


AGAIN = Review(False, 3, "The cup is there.", PLAN)


@pytest.mark.parametrize(
    "answer",
    [
        f"{as_text()}\n\n{PLAN}",
        as_json(),
        f"```json\n{as_json()}\n```",
        f"<think>Verdict: accept?</think>{as_text()}\n\n{PLAN}",
        f"**Missing:** The cup is\nthere.\n**Score:** 3/10\n**Verdict:** Retry\n\n{PLAN}",
        f"1. Missing: The cup is there.\n2. Score: 3 / 10\n3. Verdict: retry.\n\n{PLAN}",
        f"{as_text()}\n\n{PLAN}".replace("\n", "\r\n"),
        as_json(score="6/20"),
        AGAIN.render(),
    ],
)
def test_a_review_that_wants_more_is_read(answer: str) -> None:
    assert parse(answer, instruction=WISH) == AGAIN


@pytest.mark.parametrize("nothing", ["-", "—", "Nothing.", "none", ""])
def test_an_accepted_image_needs_no_plan(nothing: str) -> None:
    accepted = Review(True, BEST)
    assert parse(as_text(nothing, "10", "accept"), instruction=WISH) == accepted
    fields = as_json(missing=nothing, score=10, verdict="accept", **dict.fromkeys(SECTIONS, ""))
    assert parse(fields, instruction=WISH) == accepted
    assert parse(accepted.render(), instruction=WISH) == accepted


def test_a_new_plan_that_is_none_leaves_the_verdict() -> None:
    begun = parse(f"{as_text()}\n\n{PLAN[: PLAN.index('4.')]}", instruction=WISH)
    assert begun.blueprint is None and "section 4" in begun.flaw and begun.score == 3
    fields = parse(as_json(edit_area_localization=""), instruction=WISH)
    assert fields.blueprint is None and "section 4" in fields.flaw
    assert parse(as_text(), instruction=WISH) == Review(False, 3, "The cup is there.")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("It looks nice.", "'Verdict: …' has to hold exactly one"),
        (as_text(verdict="accept or retry"), "'Verdict: …' has to hold exactly one"),
        (f"{as_text()}\nVerdict: accept", "'Verdict: …' has to hold exactly one"),
        (as_text(score="high"), "'Score: …' has to hold one number"),
        (f"{as_text()}\nScore: 4", "'Score: …' has to hold one number"),
        (as_text(score="11"), "a score of 11 is more than 10"),
        (as_text(score="3/0"), "a score of 3 is more than 0"),
        ("I'm sorry, but I cannot help with that.", "declines to judge"),
        ("", "empty"),
        ("<think>Missing: -", "never closed"),
        ('{"verdict": "accept", "score": ', "JSON"),
    ],
)
def test_what_is_no_review_is_told(answer: str, said: str) -> None:
    with pytest.raises(BlueprintError, match=said):
        parse(answer, instruction=WISH)


def test_the_request_says_what_was_wished_and_planned() -> None:
    prompt = request_prompt(f" {WISH}\n", PLAN)
    assert f"\n{WISH}\n" in prompt and PLAN in prompt
    assert "accept" in prompt and "retry" in prompt
