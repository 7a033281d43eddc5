from __future__ import annotations

import json

import pytest

from dim.errors import BlueprintError
from dim.reading import as_reasoning
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
        f"Here is my verdict:\n\n{json.dumps(json.loads(as_json()), indent=2)}",
        f"The sign {{SALE}} is new. {as_json()} That is all.",
        f"~~~JSON5\n{as_json()[:-1]},}}\n~~~",
        json.dumps({"result": {"triage": json.loads(as_json())}}),
        json.dumps([json.loads(as_json())]),
        json.dumps(as_json()),
        json.dumps(text()),
        json.dumps(text())[1:-1],
        json.dumps({"answer": text()}),
        json.dumps({"tool": {"arguments": as_json()}}),
        repr(json.loads(as_json())),
        f"{as_json('misaligned', '-')}\nOn second thoughts: {as_json()}",
        json.dumps({"Alignment Verdict": "Aligned", "refinedInstruction": REFINED}),
        json.dumps({"alignment": "aligned", "instruction": "Add.", "refined_instruction": REFINED}),
        as_reasoning(text()),
        as_reasoning(as_json()),
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
        (f"My verdict: {as_json()[:-1]}", "JSON that is cut off"),
        (f"{as_json('misaligned')} or {as_json()[:-9]}", "JSON that is cut off"),
        (as_json()[1:-1].replace(", ", ",\n"), "JSON that is cut off"),
        (json.dumps(as_json())[:-9], "JSON that is cut off"),
        (
            json.dumps({"a": json.loads(as_json()), "b": json.loads(as_json("misaligned"))}),
            "several",
        ),
        (text(instruction='Add {"what": "a hat"}.'), "refined instruction holds a field of JSON"),
        (text(instruction='Add a hat.",\n'), "refined instruction holds the end of a text"),
        (as_reasoning("Hm.\n" + text()), "reasoning alone: it is no verdict"),
        (as_reasoning("I wonder."), "reasoning alone: it is no verdict"),
        (as_reasoning(f"Hm. {as_json()}"), "reasoning alone: it is no verdict"),
        (as_json("perhaps"), "no line 'Alignment"),
        (as_json(instruction=""), "refined instruction is missing"),
    ],
)
def test_says_what_is_wrong(answer: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        parse(answer)


def test_braces_and_quotes_of_an_instruction_stay() -> None:
    instruction = 'Put a sign that says "{SALE}" on the "OPEN" door.'
    assert parse(text(instruction=instruction)).instruction == instruction
    assert parse(as_json(instruction=instruction)).instruction == instruction


def test_a_verdict_is_looked_for_where_it_may_stand() -> None:
    assert find_alignment("x\nAlignment: misaligned", end=2) == "unstated"


def test_the_request_names_the_three_values() -> None:
    request = request_prompt(" Add a hat\n")
    assert "\nAdd a hat\n" in request
    for value in SCHEMA["properties"]["alignment"]["enum"]:
        assert value in request
    assert len(PROMPT_VERSION) == 12
