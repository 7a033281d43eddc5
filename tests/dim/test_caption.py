from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dim.caption import DIMENSIONS, SCHEMA, find_fault, parse, read, request_prompt
from dim.cues import spoken_of
from dim.errors import DesignerError
from dim.reading import as_reasoning

FIELDS: dict[str, str] = {
    "main_subject": "A brown dog sits on a wooden bench.",
    "spatial_relations": "The bench stands in front of a hedge, and a ball lies to its left",
    "counts": "There is one dog and one ball.",
    "colours": "The ball is red, and the hedge is dark green.",
    "materials": "The bench is of weathered oak.",
    "facial_expressions": "Not present",
    "weather": "There is no weather visible.",
    "lighting": "Soft light falls from the right.",
    "written_text_and_signs": 'A plate on the bench reads "Für Anna".',
    "perspective": "It is seen from the eye level of the dog.",
}
LIMITS: dict[str, Any] = {
    "min_words": 5,
    "max_words": 200,
    "min_dimensions": 6,
    "min_dimensions_in_prose": 3,
    "language": "en",
    "max_repetition": 0.2,
    "max_boilerplate": 0.34,
}
DOG = (
    "A brown dog sits on a wooden bench in front of a dark green hedge. A red ball lies to the "
    "left of the bench, and soft light falls from the right. The calm scene is viewed from the eye "
    "level of the dog."
)


def answer(**changes: str | None) -> str:
    """FIELDS, with all other dimensions not present, as JSON."""
    fields = {name: "not present" for name in SCHEMA["required"]} | FIELDS | changes
    return json.dumps({name: text for name, text in fields.items() if text is not None})


def reason(text: str, **limits: Any) -> str | None:
    """The code of the rule that an answer breaks."""
    fault = find_fault(read(text), **(LIMITS | limits))
    return fault.reason if fault else None


def test_the_request_and_the_schema_name_all_21_dimensions() -> None:
    assert len(DIMENSIONS) == len(set(DIMENSIONS)) == 21
    assert all(dimension in request_prompt() for dimension in DIMENSIONS)
    names = [name.replace("_", " ") for name in SCHEMA["required"]]
    assert (
        names
        == ["main subject", *DIMENSIONS]
        == [n.replace("_", " ") for n in SCHEMA["properties"]]
    )
    assert "not present" in request_prompt() and "Chinese" in request_prompt("zh")


def test_the_fields_that_say_something_make_one_caption() -> None:
    caption = read(answer())
    assert caption.by_field
    assert caption.covered == (
        *("spatial relations", "counts", "colours", "materials", "lighting"),
        *("written text and signs", "perspective"),
    )
    assert caption.text.startswith("A brown dog sits on a wooden bench. The bench stands in front")
    assert "to its left. There is one dog" in caption.text  # a missing full stop is put
    assert "resent" not in caption.text and "no weather" not in caption.text
    assert "\n" not in caption.text


@pytest.mark.parametrize(
    "absent",
    [
        *("", "-", "N/A", "none", "None.", "Not present.", "not visible in the image", "no"),
        *("There are no people.", "No text is visible.", "No brands or logos", "Nothing."),
        *("Not applicable (no humans)", "There is no visible text or sign in the photo."),
    ],
)
def test_what_is_absent_is_left_out(absent: str) -> None:
    assert "counts" not in read(answer(counts=absent)).covered


@pytest.mark.parametrize(
    "present", ["No entry sign above.", "None other than a dog sits. It waits."]
)
def test_what_only_begins_like_absence_is_kept(present: str) -> None:
    assert present in read(answer(counts=present)).text


def test_a_sentence_said_twice_is_kept_once() -> None:
    text = read(answer(counts="The BENCH is of weathered oak. A ball.")).text
    assert text.lower().count("the bench is of weathered oak.") == 1


@pytest.mark.parametrize(
    "form",
    [
        "{name}: {text}\n",
        "**{name}:** {text}\n\n",
        "- **{name}**: {text}\n",
        "1. {name}: {text}\n",
        "### {name}：\n{text}\n",
    ],
)
def test_a_line_per_dimension_is_the_same_answer(form: str) -> None:
    fields = json.loads(answer())
    lines = "".join(
        form.format(name=name.replace("_", " ").capitalize(), text=text)
        for name, text in fields.items()
    )
    assert read(lines) == read(answer()) == read(f"<think>x</think>```json\n{answer()}\n```")


def test_a_list_of_aspects_may_stand_where_reasoning_belongs() -> None:
    lines = "Main subject: A dog.\nCounts: One dog.\nColours: Brown."
    assert read(as_reasoning(lines)) == read(lines)


def test_prose_is_taken_as_it_is() -> None:
    assert parse("<think>hm</think>\nA dog.\n\nIt  sits.\n") == "A dog. It sits."
    assert parse(json.dumps({"caption": DOG})) == DOG
    caption = read(DOG)
    assert not caption.by_field
    assert {"colours", "materials", "lighting", "mood", "perspective"} < set(caption.covered)


@pytest.mark.parametrize(
    "form",
    [
        lambda fields: f"Here is it:\n\n{json.dumps(fields, indent=2)}\n\nIs that enough?",
        lambda fields: json.dumps({"caption": fields}),
        lambda fields: json.dumps([fields]),
        lambda fields: json.dumps(json.dumps(fields)),
        lambda fields: json.dumps({"arguments": json.dumps(fields)}),
        lambda fields: json.dumps(
            [{"aspect": name, "text": text} for name, text in fields.items()]
        ),
        lambda fields: json.dumps(
            {f"{n}. {k.title()}": v for n, (k, v) in enumerate(fields.items())}
        ),
        lambda fields: json.dumps(fields).replace("colours", "Colors"),
        lambda fields: repr(fields),
        lambda fields: f"{json.dumps(fields, indent=2)[:-2]},\n}}",
        lambda fields: as_reasoning(json.dumps(fields)),
    ],
)
def test_the_fields_are_read_in_every_wrapping(form: Callable[[dict[str, str]], str]) -> None:
    fields = json.loads(answer(written_text_and_signs='A sign says "{SALE}".'))
    caption = read(form(fields))
    assert caption == read(json.dumps(fields)) and caption.by_field
    assert 'A sign says "{SALE}".' in caption.text


def test_what_a_field_lists_is_said_one_after_the_other() -> None:
    fields = json.loads(answer()) | {"counts": ["one dog", {"balls": "one ball"}]}
    assert "One dog. One ball." in read(json.dumps(fields)).text


@pytest.mark.parametrize(
    "form",
    [
        lambda text: json.dumps(text),
        lambda text: json.dumps({"image": "a.png", "long_caption": text}),
        lambda text: f"Here it is:\n\n{json.dumps({'text': 'x', 'caption': text}, indent=2)}",
        lambda text: json.dumps({"choices": [{"message": {"role": "x", "content": text}}]}),
        lambda text: json.dumps([{"type": "text", "text": text}]),
        lambda text: f"Sure: <caption>{text}</caption>",
        lambda text: f"<description>\n{text}\n</description>",
    ],
)
def test_prose_is_read_in_every_wrapping(form: Callable[[str], str]) -> None:
    text = f'{DOG} A sign says "{{SALE}}", "GO".'
    assert read(form(text)) == read(text)
    assert read(text).text == text


def test_cues_are_named_as_the_dimensions_are() -> None:
    text = "two small red wooden round smooth smiling standing resting outdoors sky light night"
    assert set(spoken_of(text)) < set(DIMENSIONS) and len(spoken_of(text)) >= 12
    assert spoken_of("Lorem ipsum dolor.") == ()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("<think>hm</think>  ", "empty"),
        ("<think>hm", "reasoning"),
        (answer()[:-30], "JSON that is cut off"),
        (f"Here: {answer()[:-1]}", "JSON that is cut off"),
        (answer()[1:-1].replace('", "', '",\n"'), "JSON that is cut off"),
        (json.dumps(answer())[:-9], "JSON that is cut off"),
        ('{"caption": "A dog si', "JSON that is cut off"),
        ('A dog. {"box": [1, 2], "label": "dog"} sits.', "holds a field of JSON"),
        ("A dog sits.\nIt is brown \\neq black.", "holds an escape of JSON"),
        (as_reasoning(f"Okay, let me describe it. {DOG}"), "reasoning alone: it is no list"),
        (as_reasoning(f"Okay.\n{answer()}"), "reasoning alone: it is no list"),
        (as_reasoning("Hm.\nCounts: a.\nColours: b.\nMood: c."), "reasoning alone: it is no list"),
        ('{"error": "overloaded"}', "without any of the fields"),
        (json.dumps({name: "not present" for name in SCHEMA["required"]}), "every aspect"),
    ],
)
def test_what_is_no_caption_is_an_error(text: str, complaint: str) -> None:
    with pytest.raises(DesignerError, match=complaint):
        read(text)


@pytest.mark.parametrize(
    ("caption", "code", "value"),
    [
        ("a dog", "caption.too_short", 2),
        ("a dog " * 20, "caption.too_long", 40),
        ("I'm sorry, but I cannot describe this image for you.", "caption.refusal", None),
        ("I can’t help with that.", "caption.refusal", None),
    ],
)
def test_a_fault_has_a_code_and_a_number(caption: str, code: str, value: float | None) -> None:
    fault = find_fault(caption, min_words=3, max_words=30)
    assert fault is not None
    assert (fault.reason, fault.value) == (code, value)


def test_a_good_caption_has_no_fault() -> None:
    assert find_fault("I see a dog that can run", min_words=3, max_words=30) is None
    assert reason(DOG) is None and reason(answer()) is None


@pytest.mark.parametrize(
    "refusal",
    [
        "Sorry, but I am not able to describe people in photographs, as they are private.",
        "As an AI language model, I do not see images and cannot say what is in this one.",
        "Unfortunately, I cannot view the picture that you have attached to this message.",
        "抱歉，我无法描述这张图片。",
        answer(main_subject="I'm sorry, I can't describe this."),
    ],
)
def test_refusals_are_recognised(refusal: str) -> None:
    assert reason(refusal) == "caption.refusal"


def test_a_sign_that_says_sorry_is_no_refusal() -> None:
    assert reason(answer(main_subject='"Sorry, we are closed" hangs on a door.')) is None
    assert reason(answer(main_subject="Sorry faces look out of a window.")) is None


def test_few_dimensions_are_noticed() -> None:
    sparse = {name: None for name in FIELDS if name not in ("main_subject", "counts")}
    long = "There is one dog and one ball, and the dog is the larger of the two by far."
    assert reason(answer(counts=long, **sparse)) == "caption.few_dimensions"
    fault = find_fault(read(answer(counts=long, **sparse)), **LIMITS)
    assert fault is not None and (fault.value, fault.threshold) == (1, 6)
    vague = "It is something that has to do with this or that and is not what it was."
    assert reason(vague) == "caption.few_dimensions"


@pytest.mark.parametrize(
    ("text", "language", "code"),
    [
        (DOG, "zh", "caption.language"),
        (
            "一只棕色的狗坐在木制长椅上，背景是深绿色的树篱，左边有一个红色的球。",
            "en",
            "caption.language",
        ),
        ("一只棕色的狗坐在木制长椅上，背景是深绿色的树篱，左边有一个红色的球。", "zh", None),
        (
            "Ein brauner Hund sitzt auf einer Holzbank vor einer grünen Hecke.",
            "en",
            "caption.language",
        ),
        (
            "Un chien brun assis sur un banc en bois devant une haie verte.",
            "en",
            "caption.language",
        ),
        ("Коричневая собака сидит на деревянной скамейке.", "en", "caption.language"),
        ('A shop sign reads "営業中、いらっしゃいませ" on the left of a red door.', "en", None),
        ("Ein brauner Hund sitzt auf einer Bank.", "any", None),
    ],
)
def test_the_language_is_checked(text: str, language: str, code: str | None) -> None:
    limits = {"language": language, "min_dimensions_in_prose": 0}
    assert reason(text, **limits) == code


@pytest.mark.parametrize(
    "loop",
    [
        "The ball is red and the hedge is dark green today. " * 6,
        "red, green, " * 30,
        f"{DOG} {'a small tree, ' * 40}",
    ],
)
def test_a_repetition_loop_is_noticed(loop: str) -> None:
    assert reason(f"The calm dog is on the left. {loop}") == "caption.repetition"


def test_boilerplate_is_a_share_of_the_sentences() -> None:
    once = f"The image shows a bench in a park. {DOG}"
    assert reason(once) is None
    often = (
        "The image shows a brown dog on a bench. In this image, the hedge is green. We can see a "
        "red ball on the left. The light is soft."
    )
    assert reason(often) == "caption.boilerplate"
    assert find_fault(often, min_words=1, max_words=99, max_boilerplate=0.7).value == 0.75  # type: ignore[union-attr]


def test_no_real_long_caption_is_rejected(shared_real: Path) -> None:
    captions = [
        json.loads(line)["long_prompt"]
        for path in sorted((shared_real / "prompts").glob("*.jsonl"))
        for line in path.read_text().splitlines()
        if "long_prompt" in line
    ]
    assert len(captions) > 500
    assert [
        text for text in captions if reason(text, min_words=15, max_words=600) is not None
    ] == []
