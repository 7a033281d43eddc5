from __future__ import annotations

import time
from typing import Any

import pytest

from dim.loose_json import decode, unescape


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, -3e2, null, true]}', {"a": [1, 2.5, -300, None, True]}),
        ('{"a": "two\nlines"}', {"a": "two\nlines"}),
        ('{"a": [1, 2,], "b": "x",}', {"a": [1, 2], "b": "x"}),
        ("{'a': 'it\\'s', 'b': None, 'c': False}", {"a": "it's", "b": None, "c": False}),
        ("{'a': 'a dog's, and cats'', 'b': 'x'}", {"a": "a dog's, and cats'", "b": "x"}),
        ("{'a': \"the dog's\", 'b': 'a \"sign\"'}", {"a": "the dog's", "b": 'a "sign"'}),
        ('{a: "x", b-c: 1, Two Words: "y"}', {"a": "x", "b-c": 1, "Two Words": "y"}),
        ('{ // first\n "a": "x", /* second\n */ "b": 1 # third\n}', {"a": "x", "b": 1}),
        ('{"a": "x // y", "b": "# z",}', {"a": "x // y", "b": "# z"}),
        ('{"a": NaN, "b": Infinity, "c": undefined}', {"a": None, "b": None, "c": None}),
        ('{"a": "it reads "GO", or "NO".", "b": 1}', {"a": 'it reads "GO", or "NO".', "b": 1}),
        ('{“a”: “x y”， “b”： “你好，世界”}', {"a": "x y", "b": "你好，世界"}),
        ('{"a": "x"\n "b": "y"}', {"a": "x", "b": "y"}),
        ('{"a": """one "two"\nthree""", "b": \'\'\'x\'\'\'}', {"a": 'one "two"\nthree', "b": "x"}),
        ('{"a": "snake\\_case \\x41", }', {"a": "snake_case A"}),
        ('{"a": "\\ud83d\\ude00",}', {"a": "\U0001f600"}),
        ('{"a": "{SALE} [x], \\"y\\": \\\\",}', {"a": '{SALE} [x], "y": \\'}),
        ('{"a": "x", "a": "x"}', {"a": "x"}),
        ("[{'a': [{},],},]", [{"a": [{}]}]),
    ],
)  # fmt: skip
def test_what_is_whole_is_read_to_its_end(text: str, value: Any) -> None:
    assert decode(text) == (value, len(text))
    assert decode(f"so: {text} and so on", 4) == (value, 4 + len(text))


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[", '{"a"', '{"a":', '{"a": "x', '{"a": "x"', '{"a": "x",', '{"a": [1', "[1, "),
        *("{'a': 'x", '{"a": """x', '{"a": tru', '{"a": "x\\', "{a: 'x'", '{"a": "x" // }'),
        *(
            "{SALE}",
            "[SALE]",
            "[...]",
            '{"a": x}',
            "{a b}",
            '{"a" "b"}',
            "(1)",
            "'a'",
            '{"a": "x"]',
        ),
        '{"a": "x", "a": "y"}',  # which of them?
        '{"a": "one" "two"}',
        '["one" "two"]',
        '{"a": "5" wide", "b": "x"}',
        '{"a": "x, "b": "y"}',
        '{"a": "x", says the model "b": "y"}',
        '{"a": {"b"\\: "x", "c": "y"}}',
        '{"a": 00}',
    ],
)
def test_what_is_cut_off_or_tells_two_ways_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(text)


@pytest.mark.parametrize(
    "unit", ['{"a":', "[", '"', '"" ', '"/*', '", b ', '{"', "'", '" "k":', "\\"]
)
def test_no_text_takes_long(unit: str) -> None:
    text = '{"a": "' + unit * (40_000 // len(unit))
    started = time.perf_counter()
    with pytest.raises(ValueError, match=r"."):
        decode(text)
    assert time.perf_counter() - started < 2


def test_escapes_are_taken_off_one_level_at_a_time() -> None:
    assert unescape(r"a\n\"b\" \\n \u00e9") == 'a\n"b" \\n é'
    assert unescape(r"\ud83d half") == "\ufffd half"
