from __future__ import annotations

import json
import re
from typing import Any

import pytest

from dim.errors import BlueprintError
from dim.fields import (
    as_text,
    find_fields,
    find_mark,
    json_values,
    known_fields,
    letters,
    text_under,
    texts_in,
    without_escapes,
)

KNOWN = known_fields("size|shape")


def key_of(key: str) -> str | None:
    return letters(key) if letters(key) in ("size", "shape") else None


def find(text: str) -> dict[str, Any]:
    values = json_values(text, KNOWN)
    return find_fields(values, key_of, KNOWN, lambda fields: len(fields) == 2)


@pytest.mark.parametrize(
    "text",
    [
        '{"size": "big", "shape": "round"}',
        'The sign reads {SALE} and [x: 1]. So: {"size": "big", "shape": "round"} and {so} on.',
        '{"a": [{"size": "big"}], "b": {"c": {"shape": "round"}}}',
        '{"size": "big"}\n{"shape": "round"}',
        json.dumps({"arguments": json.dumps({"size": "big", "shape": "round"})}),
        json.dumps(json.dumps({"size": "big", "shape": "round"}))[1:-1],
        '[{"title": "Size", "text": "big"}, {"title": "Shape", "text": "round"}]',
        '{"1": {"heading": "1. size", "body": "big"}, "2": {"heading": "shape", "body": "round"}}',
        '{"draft": {"size": "tiny", "shape": "flat"}, "x": {"size": "big", "shape": "round"}}',
        '{"x": {"size": "tiny", "shape": "flat"}, "final": {"size": "big", "shape": "round"}}',
        '{"size": "tiny", "shape": "flat"} or rather {"size": "big", "shape": "round"}',
        '{"size": "small"} is wrong: {"size": "big", "shape": "round"}',
        '{"bbox": [1, 2]} {"size": "big", "shape": "round"} {"bbox": [3, 4]}',
    ],
)
def test_fields_are_found_wherever_they_lie(text: str) -> None:
    assert find(text) == {"size": "big", "shape": "round"}


@pytest.mark.parametrize(
    "text",
    ["", "a {SALE} sign", '{"bbox": [1, 2', 'size: "big"', "{", '["size"]', '{"x": {"y": 1}}'],
)
def test_other_braces_are_left_alone(text: str) -> None:
    if text.startswith('{"bbox'):
        text = f"see {text}"
    assert find(text) == {}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"size": "big", "sha', "cut off"),
        ('so: {"x": {"size": "big"}, "y": ', "cut off"),
        ('[{"size": "big", "shape": "round"}, {"size": "t', "cut off"),
        ('{"size": "tiny", "shape": "flat"} then {"size": "big", "sh', "cut off"),
        (json.dumps({"arguments": '{"size": "big'}), "cut off"),
        (json.dumps(json.dumps({"size": "big", "shape": "round"}))[:-9], "cut off"),
        ('"size": "big",\n"shape": "round"', "cut off"),
        ('{size: "big", shape', "cut off"),
        ('{"size": "big", "size": "tiny"}', "cut off or malformed"),
        ('{"size": "big", "Size": "tiny"}', "two texts for 'size'"),
        ('[{"size": "a", "shape": "b"}, {"size": "c", "shape": "d"}]', "several answers"),
        (f'{"[" * 30}{{"size": "big", "shape": "round"}}{"]" * 30}', "malformed"),
    ],
)
def test_fields_that_are_not_whole_or_not_clear_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(BlueprintError, match=complaint):
        find(text)


def test_texts_within_json_are_found() -> None:
    value = [{"role": "x", "content": [{"type": "text", "text": "a"}]}, {"thinking": "b"}]
    assert list(texts_in(value)) == ["x", "text", "a", "text\n\na"]
    assert text_under(value, re.compile("content|text")) == "a"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("x", "x"),
        (None, ""),
        (True, "true"),
        (["a", "- b", "1. c", "two\nlines"], "- a\n- b\n1. c\n- two\n  lines"),
        ({"a_b": "x", "c": ["y"]}, "- a b: x\n- c:\n  - y"),
        ({"d": {"e": "z", "f": ["g", "h"]}}, "- d:\n  - e: z\n  - f:\n    - g\n    - h"),
        ([{"a": "cup", "b": "red"}, {"a": "box"}], "- a: cup; b: red\n- a: box"),
        ({"text": "x"}, "x"),
        ({"description": {"text": "x"}}, "x"),
        ("half \ud83d", "half ?"),
    ],
)  # fmt: skip
def test_values_become_text(value: Any, text: str) -> None:
    assert as_text(value) == text


@pytest.mark.parametrize(
    "text",
    [
        'A sign says "{SALE}", and below it "GO", "STOP" and {"NO"}.',
        '- Text "baby": black letters',
        "[Turn the picture into a mosaic.]",
        'It reads ["OPEN"]: a plate.',
        "100 % {off} [today]",
        'He says: "Yes," and "no".',
        r"C:\Temp and \o/ and 1\2",
        "{SALE}",
    ],
)
def test_words_about_a_picture_are_no_json(text: str) -> None:
    assert find_mark(text) is None


@pytest.mark.parametrize(
    "text",
    [
        '"A table.",',
        '"A table."\n}',
        'A table.",\n  "',
        '{"shape": "round"} things',
        "a cup {'colour': 'red', 'size': 1}",
        'A table.\n}\n"x"',
        r"A table.\nA cup.",
        r"it reads \"GO\"",
        r"caf\u00e9",
        "a \x08eta",
        '["a cup", "a table"]',
    ],
)
def test_marks_of_json_are_found(text: str) -> None:
    assert find_mark(text) is not None


def test_what_was_escaped_once_too_often_is_set_right() -> None:
    assert without_escapes(r"A cup.\nA \"red\" box.") == 'A cup.\nA "red" box.'
    assert without_escapes("A cup.\\n- a\nA \\neq b") == "A cup.\n- a\nA \\neq b"
    assert without_escapes(r"a\nb C:\new") == r"a\nb C:\new"
    with pytest.raises(BlueprintError, match="cut off"):
        without_escapes(r'"A cup.\n\nA box')
