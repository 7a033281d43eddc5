from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from dim.blueprint import (
    PROMPT_VERSION,
    TITLES,
    Blueprint,
    parse_answer,
    request_prompt,
)
from dim.errors import BlueprintError

PLAN = Blueprint(
    "Remove the red circle.",
    "A wood table with two objects.",
    "- a red circle, small, on the left\n- a blue square, large, on the right",
    "The red circle on the left goes. The blue square stays.",
    "A wood table with a blue square on the right.",
)


def text(*, number: bool = True, mark: str = "", colon: str = ":", drop: int | None = None) -> str:
    """PLAN as a designer might write it."""
    bodies = (
        PLAN.instruction,
        PLAN.global_layout,
        PLAN.local_objects,
        PLAN.edit_area,
        PLAN.imagination,
    )
    return "\n\n".join(
        f"{f'{n}. ' if number else ''}{mark}{title}{colon}{mark} {body}"
        for n, (title, body) in enumerate(zip(TITLES, bodies, strict=True), 1)
        if n != drop
    )


def test_renders_the_papers_grammar() -> None:
    blocks = PLAN.render().split("\n\n")
    assert len(blocks) == 5
    assert blocks[0] == "1. Edit Instruction: Remove the red circle."
    assert blocks[4].startswith("5. Edited Image Imagination: A wood table")


def test_reads_back_what_it_renders() -> None:
    assert Blueprint.parse(PLAN.render()) == PLAN


def test_reads_back_random_text() -> None:
    rng = random.Random(4)
    alphabet = "ab :*_-\n\r\t#1.)(“é\u2028\x0b<>`"
    for _ in range(300):
        fields = ["x" + "".join(rng.choices(alphabet, k=rng.randrange(30))) for _ in TITLES]
        plan = Blueprint(*fields)
        assert Blueprint.parse(plan.render()) == plan


@pytest.mark.parametrize(
    "answer",
    [
        text(mark="**"),
        text(mark="__"),
        text(number=False),
        text(number=False, mark="**"),
        text().replace(". ", ") ", 1),
        text().lower().replace("remove the red circle.", PLAN.instruction),
        text().replace("2. Global Layout Perception:", "### 2. Global Layout Perception\n"),
        text().replace("2. Global Layout Perception: ", "2. Global Layout Perception\n\n"),
        text().replace("3. Local Object Perception: ", "3. **Local Object Perception:**  \n"),
        text().replace("4. Edit Area Localization: ", "4. Edit Area Localization - "),
        text().replace("4. Edit Area Localization: ", "Step 4: **Edit Area Localization**: "),
        text().replace("\n\n", "\n"),
        text().replace("\n", "\r\n"),
        text().replace("\n\n", "\n\n\n  \n"),
        f"<think>1. Edit Instruction: a draft\nthat does not count</think>\n{text()}",
        f"so far I only thought</think>{text()}",
        f"<think>x</think><answer>\n{text()}\n</answer>",
        f"<answer>{text()}",
        f"```markdown\n{text()}\n```",
        f"Here is the plan:\n\n{text()}",
        f"Alignment: aligned\n\n{text()}",
    ],
)
def test_reads_the_forms_of_real_designers(answer: str) -> None:
    found = Blueprint.parse(answer)
    assert found.instruction == PLAN.instruction
    assert [str(f).casefold() for f in (found.global_layout, found.edit_area)] == [
        PLAN.global_layout.casefold(),
        PLAN.edit_area.casefold(),
    ]
    assert found.local_objects.casefold() == PLAN.local_objects.casefold()
    assert found.imagination.casefold() == PLAN.imagination.casefold()


def test_a_bullet_or_sentence_that_names_a_section_is_no_heading() -> None:
    answer = text().replace(
        "The blue square stays.",
        "It stays.\n- Edit Instruction: as given\nEdit area localization is easy here.",
    )
    assert "Edit Instruction: as given" in Blueprint.parse(answer).edit_area


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("", "empty"),
        ("   \n ", "empty"),
        ("I'm sorry, I can't help with editing this image.", "none of the five"),
        ('{"error": "overloaded"}', "none of the five"),
        ("<think>it goes on and on", "reasoning"),
        (text(drop=1), r"section 1 \(Edit Instruction\) is missing"),
        (text(drop=3), r"section 3 \(Local Object Perception\) is missing"),
        (text(drop=5), r"section 5 \(Edited Image Imagination\) is missing"),
        (text()[:200], "are missing"),
        (text() + "\n\n" + text(), "section 1 .* appears 2 times"),
        (text().replace(PLAN.edit_area, ""), r"section 4 \(Edit Area Localization\) is empty"),
        (text().replace(PLAN.imagination, "  "), r"section 5 .* is empty"),
    ],
)
def test_says_what_is_wrong(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        Blueprint.parse(answer)


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_refuses_swapped_sections(first: int) -> None:
    blocks = text().split("\n\n")
    blocks[first], blocks[first + 1] = blocks[first + 1], blocks[first]
    with pytest.raises(BlueprintError, match="out of order"):
        Blueprint.parse("\n\n".join(blocks))


def test_refuses_swapped_titles_under_right_numbers() -> None:
    answer = text().replace(TITLES[2], "X").replace(TITLES[3], TITLES[2]).replace("X", TITLES[3])
    with pytest.raises(BlueprintError, match="out of order"):
        Blueprint.parse(answer)


def test_a_known_instruction_stands_in_for_a_missing_first_section() -> None:
    assert Blueprint.parse(text(drop=1), instruction=PLAN.instruction) == PLAN
    assert Blueprint.parse(text(), instruction="another one") == PLAN
    with pytest.raises(BlueprintError, match="section 2"):
        Blueprint.parse(text(drop=2), instruction="x")


def test_a_blueprint_cannot_be_made_that_would_not_read_back() -> None:
    with pytest.raises(BlueprintError, match="section 2 .* is empty"):
        Blueprint("a", " \n", "c", "d", "e")
    with pytest.raises(BlueprintError, match="holds the heading of section 4"):
        Blueprint("a", "b\n4. Edit Area Localization: x", "c", "d", "e")
    with pytest.raises(BlueprintError, match="tag '</think>'"):
        Blueprint("a", "b</think>", "c", "d", "e")


@pytest.mark.parametrize(
    ("line", "alignment"),
    [
        ("Alignment: aligned", "aligned"),
        ("**Alignment:** Partially aligned", "partially aligned"),
        ("Alignment - partially-aligned.", "partially aligned"),
        ("Let me compare.\nAlignment: aligned (fits)", "aligned"),
        ("", "unstated"),
    ],
)
def test_reads_the_alignment_in_front(line: str, alignment: str) -> None:
    answer = parse_answer(f"{line}\n\n{text(mark='**')}", instruction="x")
    assert answer.alignment == alignment
    assert answer.blueprint == PLAN
    assert answer.words == text(mark="**")


@pytest.mark.parametrize("value", ["misaligned", "Misaligned.", "**mis-aligned**", "not aligned"])
def test_misaligned_needs_no_blueprint(value: str) -> None:
    answer = parse_answer(f"Alignment: {value}\nNothing was removed.", instruction="x")
    assert (answer.alignment, answer.blueprint, answer.words) == ("misaligned", None, None)


def test_alignment_counts_in_front_only() -> None:
    answer = parse_answer(text() + "\nAlignment: misaligned", instruction="x")
    assert answer.alignment == "unstated"


def test_words_are_rendered_where_the_first_section_was_missing() -> None:
    answer = parse_answer(text(drop=1), instruction=PLAN.instruction)
    assert answer.words == PLAN.render()


def test_the_request_shows_what_is_asked() -> None:
    alone, pair = request_prompt("Add a hat", False), request_prompt("Add a hat", True)
    for title in TITLES:
        assert title in alone and title in pair
    assert "Add a hat" in alone and "Add a hat" in pair
    assert "Alignment:" in pair and "Alignment:" not in alone
    assert "target" not in alone and "reference" not in alone
    assert len(PROMPT_VERSION) == 12


@pytest.mark.parametrize("name", ["imgedit_gpt4o", "imgedit_qwen2.5vl_3b"])
def test_all_real_blueprints_are_read(shared_real: Path, name: str) -> None:
    lines = (shared_real / "blueprints" / f"{name}.jsonl").read_text().splitlines()
    assert len(lines) == 737
    for line in lines:
        record = json.loads(line)
        found = Blueprint.parse(record["blueprint"])
        assert Blueprint.parse(found.render()) == found
        assert not found.global_layout.startswith("*")
        assert parse_answer(record["blueprint"], instruction="").words == record["blueprint"]


def test_damaged_real_blueprints_are_refused(shared_real: Path) -> None:
    lines = (shared_real / "blueprints" / "imgedit_gpt4o.jsonl").read_text().splitlines()
    rng = random.Random(0)
    for line in rng.sample(lines, 100):
        plan = Blueprint.parse(json.loads(line)["blueprint"])
        starts = [plan.render().index(f"{n}. {title}") for n, title in enumerate(TITLES, 1)]
        cut = plan.render()[: rng.randrange(10, starts[4])]
        number = rng.randrange(5)
        start, end = ([*starts, len(plan.render())][n] for n in (number, number + 1))
        missing = plan.render()[:start] + plan.render()[end:]
        for broken in (cut, missing):
            with pytest.raises(BlueprintError):
                Blueprint.parse(broken)
