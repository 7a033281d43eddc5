from __future__ import annotations

import json

import pytest

from dim.errors import BlueprintError
from dim.triage import PROMPT_VERSION, SCHEMA, find_alignment, parse, request_prompt

REFINED = "Add a small red hat to the dog on the left."


def text(alignment: str = "aligned", instruction: str = REFINED) -> str:
    """A triage as it is asked for."""
    return f"Differences: a hat was added.\nAlignment: {alignment}\nInstruction: {instruction}"


def as_json(alignment: str = "aligned", instruction: str = REFINED) -> str:
    """The same where the server keeps to the schema."""
    return json.dumps({"differences": "x", "alignment": alignment, "instruction": instruction})


@pytest.mark.parametrize(
    "answer",
    [
        text(),
        as_json(),
        f"```json\n{as_json()}\n```",
        f"<think>Alignment: misaligned?</think>\n{text()}",
        f"<answer>{text()}</answer>",
        text().replace("Alignment:", "**Alignment:**").replace("Instruction:", "**Instruction**:"),
        text().replace("Alignment: ", "2. Alignment - ").replace("Instruction", "3. Instruction"),
        text().replace("Alignment: ", "### Alignment\n").replace("Instruction: ", "Instruction:\n"),
        text().replace("Instruction:", "Refined Instruction:").replace(REFINED, f'"{REFINED}"'),
        text().replace(":", "：").replace("\n", "\r\n"),
        text("The alignment is: aligned").replace("Alignment: The", "The"),
        text().replace("Differences", "Instruction: the one given.\nDifferences"),
    ],
)
def test_reads_the_forms_of_real_designers(answer: str) -> None:
    found = parse(answer)
    assert (found.alignment, found.instruction) == ("aligned", REFINED)


@pytest.mark.parametrize("form", [text, as_json])
@pytest.mark.parametrize(
    ("value", "alignment"),
    [
        ("Aligned", "aligned"),
        ("partially aligned", "partially aligned"),
        ("Partially_Aligned", "partially aligned"),
        ("partially aligned (not misaligned)", "partially aligned"),
    ],
)
def test_reads_each_value(form: object, value: str, alignment: str) -> None:
    if form is text or "(" not in value:
        assert parse(form(value)).alignment == alignment  # type: ignore[operator]


@pytest.mark.parametrize("form", [text, as_json])
@pytest.mark.parametrize("value", ["misaligned", "Mis-aligned.", "not aligned"])
def test_a_misaligned_instruction_is_not_refined(form: object, value: str) -> None:
    found = parse(form(value, "-"))  # type: ignore[operator]
    assert (found.alignment, found.instruction) == ("misaligned", None)
    assert parse(form(value)).instruction is None  # type: ignore[operator]


@pytest.mark.parametrize(
    ("answer", "complaint"),
    [
        ("", "empty"),
        ("I'm sorry, I can't compare these images.", "declines to judge"),
        ("The hat was added to the dog.", "no line 'Alignment"),
        ("Alignment: great\nInstruction: x", "no line 'Alignment"),
        (text("aligned / partially aligned / misaligned"), "exactly one"),
        (text("aligned, partially aligned or misaligned"), "exactly one"),
        (f"{text()}\nAlignment: misaligned", "exactly one"),
        (text(instruction="-"), "refined instruction is missing"),
        ("Alignment: partially aligned", "refined instruction is missing"),
        (text(instruction="I'm sorry, I cannot do that."), "declines the work"),
        (as_json()[:-30], "JSON that is cut off"),
        (as_json("perhaps"), "no line 'Alignment"),
        (as_json(instruction=""), "refined instruction is missing"),
    ],
)
def test_says_what_is_wrong(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        parse(answer)


def test_a_verdict_is_looked_for_where_it_may_stand() -> None:
    assert find_alignment("x\nAlignment: misaligned", end=2) == "unstated"


def test_the_request_names_the_three_values() -> None:
    request = request_prompt(" Add a hat\n")
    assert "\nAdd a hat\n" in request
    for value in SCHEMA["properties"]["alignment"]["enum"]:
        assert value in request
    assert len(PROMPT_VERSION) == 12
