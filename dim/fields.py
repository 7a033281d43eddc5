"""The fields of an answer in JSON, wherever in the answer it begins and however it is wrapped.

An answer may be the object that was asked for, or hold it behind words, in a fence, under a key, in
an array, as a text within other JSON, or in several objects. It is looked for by the names of its
fields. JSON that names one of them and cannot be read whole is an error and never a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from dim.errors import BlueprintError
from dim.loose_json import decode, unescape
from dim.records import clean_text

KeyOf = Callable[[str], str | None]
"""The field that a key of an answer names, if it names one."""

_MALFORMED = "the answer is JSON that is cut off or malformed"
_MOST_FAILURES = 32  # openings of JSON that are none, after which no more are tried
_DEEPEST = 20  # levels of objects and arrays; no answer has as many

_QUOTE = "[\"'“”‘’]"
_OPENING = re.compile(r"[{\[](?=(?:\s|\\[nrt])*(?:[\"'“”‘’{\[}\]/#\\]|\w[\w .$-]{0,60}[:：]))")
_OPENS_WITH_A_KEY = re.compile(
    rf"(?:\[\s*)*\{{\s*(?:\"[^\"\n]{{1,80}}\"|{_QUOTE}[^\"'“”‘’\n]{{1,80}}{_QUOTE})\s*[:：]"
)
_OPENS_ESCAPED = re.compile(r"[{\[](?:[\[{\s]|\\+[nrt])*\\+[\"']")
_OVER_ESCAPED = re.compile(r"(?:\\r)?\\n(?![a-z])|\\\"|(?:\\u[0-9a-fA-F]{4})+")

_BARE_QUOTE = re.compile(r"(?<!\\)\"")
_STRING = re.compile(r"(?<!\\)\"(?:[^\"\\\n]|\\.)*+\"")

# What the answer says before its answer, as the keys of an object call it.
_ASIDE = re.compile(r"think|thinking|thoughts?|reasoning(?:content)?|reflection|scratchpad|drafts?")
_FINAL = re.compile(r"(?:the)?(?:final|revised|corrected|improved|answer|result|output|response)")
_CONTENT = frozenset(("text", "content", "contents", "description", "value", "body", "details"))
_BULLET = re.compile(r"(?:[-*•·]|\d+[.)])\s")

_VALUE = r"(?:[\"'“‘{\[]|-?\d|[tT]rue\b|[fF]alse\b|null\b|None\b)"
_MARKS = {
    "a field": re.compile(
        rf"[{{\[,]\s*(?:\"[^\"\n]{{1,80}}\"|'[^'\n]{{1,80}}'|“[^”\n]{{1,80}}”)\s*[:：]\s*{_VALUE}"
    ),
    "the end of a text": re.compile(
        r"\A[\"“].*[\"”]\s*[}\]][\s,}\]]*\Z|[\"”][\s{}\[\]:]{0,9},[\s,{}\[\]:]{0,9}[\"“]?\Z"
        r"|[\"”]\W{0,9}\n\s{0,40}[\"“]\Z",
        re.DOTALL,
    ),
    "a bracket alone": re.compile(r"^[^\S\n]*[{}\[\]]+,?[^\S\n]*$", re.MULTILINE),
    "an escape": re.compile(r"\\(?:n|\"|u[0-9a-fA-F]{4})"),
    "a control character": re.compile(r"[\x00-\x08\x0c\x0e-\x1f]"),
}


def known_fields(names: str) -> re.Pattern[str]:
    """Finds fields of JSON in a text that may be broken: one of ``names``, a colon and a value.

    Args:
        names: a regular expression without capturing groups.
    """
    numbered = r"(?:(?:section|step)?[\s_]*\d[\s_.):-]*)?"
    quoted = rf"\\*{_QUOTE}[^\w\n]{{0,4}}{numbered}(?:{names})[^\w\n]{{0,4}}{_QUOTE}"
    return re.compile(
        rf"(?:^[^\S\n]*|(?:[{{\[,]|\\n)\s*){quoted}\s*[:：]\s*[\\\"'“‘{{\[]"
        rf"|\{{\s*(?:{names})\s*[:：]",
        re.IGNORECASE | re.MULTILINE,
    )


def json_values(text: str, known: re.Pattern[str]) -> list[Any]:
    """The objects and arrays of JSON in ``text``, in order; braces of prose are left alone.

    A string counts too where it has line ends that are escaped, as prose never has.

    Args:
        text: an answer, or a text within one.
        known: of :func:`known_fields`; tells JSON that matters from other braces.

    Raises:
        BlueprintError: there is a field that matters outside of all JSON that can be read whole.
    """
    values: list[Any] = []
    outside: list[str] = []
    place = failures = read = 0
    while failures < _MOST_FAILURES and (opening := _OPENING.search(text, place)):
        start = opening.start()
        if _OPENS_ESCAPED.match(text, start):
            return values + json_values(unescape(text[start:]), known)
        try:
            value, place = _decode(text, start)
        except ValueError:
            failures += 1
            place = start + 1
            named = _OPENS_WITH_A_KEY.match(text, start)
            if named and (not text[:start].strip() or known.search(text, start)):
                raise BlueprintError(_MALFORMED) from None
        else:
            values.append(value)
            outside.append(text[read:start])
            read = place
    rest = "\n".join([*outside, text[read:]])
    if known.search(rest):
        raise BlueprintError(_MALFORMED)
    return values + [unescape(said[0][1:-1]) for said in _STRING.finditer(rest) if "\\n" in said[0]]


def find_fields(
    values: Sequence[Any],
    key_of: KeyOf,
    known: re.Pattern[str],
    is_whole: Callable[[Mapping[str, Any]], bool],
) -> dict[str, Any]:
    """The fields that are meant, by the names that ``key_of`` gives them; none if there are none.

    Fields may lie at any depth and in several objects. What lies under a key such as ``thinking``
    or ``draft`` does not count. Of several answers one after the other the last counts; within one
    object, the one under a key such as ``final``.

    Args:
        values: of :func:`json_values`.
        key_of: the name of a field.
        known: as of :func:`json_values`, for JSON that is a text within other JSON.
        is_whole: whether some fields are an answer by themselves.

    Raises:
        BlueprintError: there are several answers, and nothing says which is meant; or JSON within
            a text cannot be read whole.
    """
    found = [
        fields for value in values if (fields := _of_one(_holders(value, key_of, known), is_whole))
    ]
    if not found:
        return {}
    merged = _merged(found)
    if merged is not None:
        return merged
    return ([fields for fields in found if is_whole(fields)] or found)[-1]


def texts_in(value: Any) -> Iterator[str]:
    """Every text within a JSON value; several side by side also as one, after each of them."""
    if isinstance(value, str):
        yield value
        return
    parts = _parts(value)
    for part in parts:
        yield from texts_in(part)
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) > 1:
        yield "\n\n".join(texts)


def text_under(value: Any, wanted: re.Pattern[str]) -> str | None:
    """The first text within ``value`` under a key whose letters are ``wanted``."""
    for key, inner in _entries(value):
        holds_objects = any(isinstance(part, dict) for part in [inner, *_parts(inner)])
        if wanted.fullmatch(letters(key)) and not holds_objects and as_text(inner).strip():
            return as_text(inner)
    return next((text for part in _parts(value) if (text := text_under(part, wanted))), None)


def as_text(value: Any) -> str:
    """A value of a JSON answer as text: a list becomes bullets, an object named bullets."""
    if isinstance(value, dict):
        only = [inner for key, inner in value.items() if letters(key) in _CONTENT]
        if len(value) == len(only) == 1:
            return as_text(only[0])
        return "\n".join(_named(key, inner) for key, inner in value.items())
    if isinstance(value, list):
        return "\n".join(_bullet(_on_one_line(inner)) for inner in value)
    if value is None:
        return ""
    return clean_text(str(value).lower() if isinstance(value, bool) else str(value))


def letters(name: str) -> str:
    """The letters of a key, in lower case: spelling and numbers make no difference."""
    return "".join(letter for letter in name.lower() if letter.isalpha())


def without_escapes(text: str) -> str:
    """``text`` without the escapes of a string that was encoded once too often.

    Raises:
        BlueprintError: it is a string of JSON that does not end.
    """
    if not _OVER_ESCAPED.search(text):
        return text
    if len(_BARE_QUOTE.findall(text)) % 2 or text.endswith("\\"):
        raise BlueprintError(_MALFORMED)
    if "\\n" in text and "\n" not in text.strip():
        return unescape(text)
    return _OVER_ESCAPED.sub(lambda match: unescape(match[0]).replace("\r", ""), text)


def find_mark(text: str) -> str | None:
    """What in a text is JSON and no words, if anything is: it was not read as it was meant."""
    for what, pattern in _MARKS.items():
        if found := pattern.search(text):
            return f"{what} of JSON ({found[0].strip()[:40]!r})"
    if stands_alone(text) and _is_json(text):
        return f"JSON ({text[:40]!r})"
    return None


def stands_alone(text: str) -> bool:
    """Whether an answer in JSON has no words in front of it or behind."""
    return text[:1] in ("{", "[") and text[-1:] in ("}", "]")


def _is_json(text: str) -> bool:
    try:
        return _decode(text, 0)[1] == len(text)
    except ValueError:
        return False


def _decode(text: str, start: int) -> tuple[Any, int]:
    value, end = decode(text, start)
    level, depth = [value], 0
    while level := [inner for outer in level for _, inner in _entries(outer)]:
        depth += 1
        if depth > _DEEPEST:
            raise ValueError("nested too deeply")
    return value, end


def _holders(
    value: Any, key_of: KeyOf, known: re.Pattern[str], under: str = ""
) -> Iterator[tuple[str, dict[str, Any]]]:
    """The fields that each object within ``value`` has, and the key that it lies under."""
    if isinstance(value, str):
        for inner in json_values(value, known) if "{" in value else ():
            yield from _holders(inner, key_of, known, under)
        return
    fields = _fields(value, key_of)
    if fields:
        yield under, fields
    for key, inner in _entries(value):
        is_field = fields and (key_of(key) or _titled(inner, key_of))
        if not is_field and not _ASIDE.fullmatch(letters(key)):
            yield from _holders(inner, key_of, known, key)


def _fields(value: Any, key_of: KeyOf) -> dict[str, Any]:
    """The fields of an object, or of a list of objects that each name one as their title."""
    pairs = [(name, inner) for key, inner in _entries(value) if (name := key_of(key))]
    if not pairs:
        pairs = [pair for inner in _parts(value) if (pair := _titled(inner, key_of))]
    found: dict[str, Any] = {}
    for name, inner in pairs:
        if found.get(name, inner) != inner:
            raise BlueprintError(f"the answer has two texts for {name!r}")
        found[name] = inner
    return found


def _titled(value: Any, key_of: KeyOf) -> tuple[str, Any] | None:
    """The field in an object such as ``{"title": "Edit Instruction", "text": "…"}``."""
    if not isinstance(value, dict) or len(value) < 2:
        return None
    titles = [(key, name) for key, v in value.items() if isinstance(v, str) and (name := key_of(v))]
    if len(titles) != 1:
        return None
    rest = {key: inner for key, inner in value.items() if key != titles[0][0]}
    contents = [inner for key, inner in rest.items() if letters(key) in _CONTENT]
    return titles[0][1], contents[0] if len(contents) == 1 else rest


def _of_one(
    holders: Iterable[tuple[str, dict[str, Any]]], is_whole: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """The fields that are meant in one value."""
    found = list(holders)
    merged = _merged([fields for _, fields in found])
    if merged is not None:
        return merged
    whole = [(key, fields) for key, fields in found if is_whole(fields)]
    final = [fields for key, fields in whole if _FINAL.match(letters(key))]
    if len(whole) == 1:
        return whole[0][1]
    if len(final) == 1:
        return final[0]
    raise BlueprintError("the answer holds several answers and does not say which is meant")


def _merged(found: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """All fields together; ``None`` if two objects say different things of one."""
    merged: dict[str, Any] = {}
    for fields in found:
        if any(merged.get(name, inner) != inner for name, inner in fields.items()):
            return None
        merged |= fields
    return merged


def _entries(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [("", inner) for inner in value] if isinstance(value, list) else []


def _parts(value: Any) -> list[Any]:
    return [inner for key, inner in _entries(value) if not _ASIDE.fullmatch(letters(key))]


def _named(key: str, value: Any) -> str:
    return _bullet(f"{_words(key)}:", as_text(value))


def _bullet(text: str, more: str = "") -> str:
    """A list item; what has several lines goes on below, indented."""
    lines = [line for line in more.split("\n") if line.strip()]
    if len(lines) == 1 and not _BULLET.match(lines[0]):
        text, lines = f"{text} {lines[0]}", []
    first, *rest = [*text.split("\n"), *lines]
    first = first if _BULLET.match(first) else f"- {first}"
    return "\n".join([first.rstrip(), *(f"  {line}" for line in rest)])


def _on_one_line(value: Any) -> str:
    """An item of a list; an object of plain values is one line."""
    if isinstance(value, dict) and len(value) > 1:
        plain = not any(isinstance(inner, dict | list) for inner in value.values())
        if plain:
            return "; ".join(f"{_words(key)}: {as_text(inner)}" for key, inner in value.items())
    return as_text(value)


def _words(key: str) -> str:
    return clean_text(key.replace("_", " ").strip())
