"""JSON as language models write it: read whole, or not at all.

Strict JSON is read by the standard library. What goes beyond it (single or curly quotes, bare keys,
comments, a comma too many or too few, line ends and quotation marks within a text, ``None``,
``NaN``) is rewritten as strict JSON, mark by mark, and read by the same library. Nothing is ever
completed: what does not end, or does not tell where a text ends, is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

_BRACKETS = {"{": "}", "[": "]"}
_MARKS = {",": ",", "，": ",", ":": ":", "：": ":"}
_CLOSING = {'"': '"', "'": "'", "“": "”“", "”": "”“", "‘": "’‘", "’": "’‘"}
_LITERALS = {
    **dict.fromkeys(("true", "True", "TRUE"), "true"),
    **dict.fromkeys(("false", "False", "FALSE"), "false"),
    **dict.fromkeys(("null", "None", "NULL", "undefined", "NaN", "nan"), "null"),
    **dict.fromkeys(("Infinity", "-Infinity", "inf", "-inf"), "null"),
}

# A comment that is longer than this is none.
_GAP = r"(?:\s|//[^\n]{0,400}|/\*(?s:.){0,400}?\*/|\#[^\n]{0,400})*+"
_QUOTED_KEY = r"""(?:"[^"\n]{1,80}"|'[^'\n]{1,80}'|[“”][^“”\n]{1,80}[“”]|[‘’][^‘’\n]{1,80}[‘’])"""
_SPACE = re.compile(_GAP)
_WORD = re.compile(r"[^\s{}\[\],:，：\"'“”‘’]+")
_NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?")
_BARE_KEY = re.compile(r"(\w[\w .$-]{0,60}?)\s*(?=[:：])")
# What follows the quotation mark that ends a text. Any other one belongs to the text.
_AFTER_KEY = re.compile(rf"{_GAP}[:：]")
_AFTER_FIELD = re.compile(
    rf"{_GAP}(?:\}}|[,，]{_GAP}(?:\}}|(?:{_QUOTED_KEY}|\w[\w$-]{{0,60}}){_GAP}[:：])"
    rf"|{_QUOTED_KEY}{_GAP}[:：])"
)
_AFTER_ITEM = re.compile(
    rf"{_GAP}(?:\]|[,，]{_GAP}(?:[\]{{\[\"'“”‘’\d-]|[tT]rue\b|[fF]alse\b|null\b|None\b))"
)

_ENDS = {quote: re.compile(rf"\\.|[{ends}]", re.DOTALL) for quote, ends in _CLOSING.items()}
# Within a text these are no quotation marks of its own: it ran on into the next text.
_RUN_ON = {
    quote: re.compile(
        rf"{quote}\s*{quote}|{quote}[\s,:{{}}\[\]\\]*\n[\s,:{{}}\[\]\\]*{quote}"
        rf"|(?:\A|{quote})[^{quote}\n]{{1,80}}{quote}\s*[:：]\s*[{quote}{{\[]"
    )
    for quote in "\"'"
}
_ESCAPE = re.compile(r"\\(u[0-9a-fA-F]{4}|x[0-9a-fA-F]{2}|\r?\n|.)", re.DOTALL)
_ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f", "\n": "", "\r\n": ""}


def decode(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at ``text[start]``, and where it ends.

    Numbers that are none (``NaN``) are ``None``. What is not strict JSON has to be an object or an
    array.

    Raises:
        ValueError: it is cut off or malformed, or has two values for one key.
    """
    try:
        return _STRICT.raw_decode(text, start)
    except (ValueError, RecursionError):
        if text[start : start + 1] not in _BRACKETS:
            raise ValueError("neither an object nor an array") from None
        rewritten, end = _rewrite(text, start)
    try:
        return _STRICT.raw_decode(rewritten)[0], end
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unescape(text: str) -> str:
    """``text`` without one level of the escapes that JSON, JavaScript and Python have in strings.

    A backslash in front of any other character goes.
    """
    plain = _ESCAPE.sub(_unescape_one, text)
    # Halves of a surrogate pair that were written one after the other are one character.
    return plain.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _unescape_one(match: re.Match[str]) -> str:
    code = match[1]
    if len(code) > 2:
        return chr(int(code[1:], 16))
    return _ESCAPED.get(code, code)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{key!r} has two values")
        found[key] = value
    return found


# Not strict about what is within a string: models write line ends as they are.
_STRICT = json.JSONDecoder(
    strict=False, object_pairs_hook=_unique, parse_constant=lambda _name: None
)


def _rewrite(text: str, start: int) -> tuple[str, int]:
    """What begins at ``text[start]`` in strict JSON, as far as single marks go, and its end.

    Whether the marks follow each other as they must is left to the strict decoder.
    """
    written: list[str] = []
    closing: list[str] = []
    place = start
    while True:
        place = _end(_SPACE.match(text, place))
        char = text[place : place + 1]
        if char in _BRACKETS:
            _write(written, char, closing)
            closing.append(_BRACKETS[char])
            place += 1
        elif closing and char == closing[-1]:
            if written[-1] == ",":
                written.pop()
            written.append(closing.pop())
            place += 1
        elif char in _MARKS:
            written.append(_MARKS[char])
            place += 1
        elif char in _CLOSING:
            value, place = _string(text, place, _follows(written, closing))
            _write(written, json.dumps(value), closing)
        else:
            value, place = _word(text, place, key=_follows(written, closing) is _AFTER_KEY)
            _write(written, value, closing)
        if not closing:
            return "".join(written), place


def _write(written: list[str], value: str, closing: list[str]) -> None:
    """Append a value or a key, and the comma that is missing between two fields."""
    after_value = bool(written) and written[-1] not in ("{", "[", ",", ":")
    if after_value and closing[-1:] == ["}"]:
        written.append(",")
    written.append(value)


def _follows(written: list[str], closing: list[str]) -> re.Pattern[str]:
    """What comes after a string at this place."""
    if closing[-1:] != ["}"]:
        return _AFTER_ITEM
    return _AFTER_FIELD if written[-1] == ":" else _AFTER_KEY


def _word(text: str, place: int, *, key: bool) -> tuple[str, int]:
    if key and (bare := _BARE_KEY.match(text, place)):
        return json.dumps(bare[1]), bare.end()
    word = _WORD.match(text, place)
    if word is not None and word[0] in _LITERALS:
        return _LITERALS[word[0]], word.end()
    if word is not None and _NUMBER.fullmatch(word[0]):
        return word[0], word.end()
    raise ValueError(f"neither a value nor a key at character {place}")


def _string(text: str, place: int, follows: re.Pattern[str]) -> tuple[str, int]:
    """The string that begins at ``text[place]``, and its end."""
    quote = text[place]
    if text.startswith(3 * quote, place) and (end := text.find(3 * quote, place + 3)) > 0:
        return unescape(text[place + 3 : end]), end + 3
    inner = 0
    for mark in _ENDS[quote].finditer(text, place + 1):
        if mark[0][0] == "\\":
            continue
        if follows.match(text, mark.end()):
            found = text[place + 1 : mark.start()]
            if inner:
                _check_inner(found, quote, inner, key=follows is _AFTER_KEY)
            return unescape(found), mark.end()
        inner += 1
    raise ValueError(f"the text that begins at character {place} has no end")


def _check_inner(text: str, quote: str, inner: int, *, key: bool) -> None:
    """Quotation marks that nobody escaped belong to a text if they come in pairs, in one text."""
    if key or (quote == '"' and inner % 2):
        raise ValueError(f"a quotation mark where none can be in {text[:40]!r}")
    if quote in _RUN_ON and _RUN_ON[quote].search(text):
        raise ValueError(f"several texts in one: {text[:40]!r}")


def _end(match: re.Match[str] | None) -> int:
    assert match is not None  # the pattern matches nothing too
    return match.end()
