"""Triage: does the instruction say what really differs between source and target?

A *misaligned* instruction is dropped, a *partially aligned* one gets the changes it leaves out, an
*aligned* one is made unambiguous. The last two yield a refined instruction to plan from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from dim.errors import BlueprintError
from dim.fields import (
    as_text,
    find_fields,
    find_mark,
    json_values,
    known_fields,
    letters,
    stands_alone,
    texts_in,
    without_escapes,
)
from dim.reading import answer_text, as_reasoning, is_reasoning, is_refusal, telling_reasoning

Alignment = Literal["aligned", "partially aligned", "misaligned", "unstated"]
"""How an instruction fits its image pair; ``unstated`` when the designer was not asked."""

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "differences": {"type": "string"},
        "alignment": {"type": "string", "enum": ["aligned", "partially aligned", "misaligned"]},
        "instruction": {"type": "string"},
    },
    "required": ["differences", "alignment", "instruction"],
    "additionalProperties": False,
}
"""JSON schema of a triage, for servers that can keep an answer to one."""

_REQUEST = """\
Two images are attached: first a source image, then the same image after an edit. The instruction \
that is said to lead from one to the other is:
{instruction}

Compare the two images, judge the instruction by what really differs, and write three lines:

Differences: every visible change from the first image to the second, in one or two sentences.
Alignment: one of the values aligned (the instruction describes all the differences), partially \
aligned (it describes only some of them) or misaligned (it describes something else, or nothing \
differs).
Instruction: the instruction as one complete and unambiguous sentence for someone who sees only \
the first image, with every visible change that it left out; a dash if it is misaligned.

Write plain text and nothing before or after these lines. If the answer has to be JSON, each line \
is one field."""

PROMPT_VERSION = hashlib.sha256(f"{_REQUEST}\0{json.dumps(SCHEMA)}".encode()).hexdigest()[:12]
"""Changes exactly when the request does; part of every cached answer's key."""

_VALUE = r"partially[ _-]*aligned|mis-?aligned|not[ _-]*aligned|aligned"
_ALIGNMENT = re.compile(
    rf"^[^\w\n]*(?:\d[^\w\n]+)?(?:(?:the|final|overall)\s+)*alignment(?:\s+(?:verdict|status|is))*\W{{1,20}}"
    rf"(?P<value>{_VALUE})\b(?P<more>\W{{0,6}}(?:or\s+)?(?:{_VALUE})\b)?",
    re.IGNORECASE | re.MULTILINE,
)
_INSTRUCTION = re.compile(
    r"^[^\w\n]*(?:\d[^\w\n]+)?(?:(?:the|refined|revised|final|edit|updated)\s+)*instruction[^\w\n:：]{0,9}[:：]"
    r"[^\S\n]*(?P<first>[^\n]*)(?P<next>(?:\n[^\n]*)?)",
    re.IGNORECASE | re.MULTILINE,
)
_AROUND = " \t\n*_\"'“”‘’`"
_BEGINNING = re.compile(
    r"\W{0,9}(?:\d\W{1,3})?(?:differences|alignment|instruction)\b", re.IGNORECASE
)
_NAMES = {
    "alignment": "alignment",
    "alignmentverdict": "alignment",
    "alignmentstatus": "alignment",
    "instruction": "instruction",
    "editinstruction": "instruction",
    "refinedinstruction": "refined instruction",
    "revisedinstruction": "refined instruction",
}
_KNOWN = known_fields(r"alignment|(?:refined|revised|edit)?[\s_-]*instruction|differences")


@dataclass(frozen=True)
class Triage:
    """A verdict; ``instruction`` is the refined one, ``None`` exactly when it is misaligned."""

    alignment: Alignment
    instruction: str | None


def request_prompt(instruction: str) -> str:
    """The text sent to a vision-language model together with source and target."""
    return _REQUEST.format(instruction=instruction.strip())


def parse(text: str) -> Triage:
    """Read a designer's triage, in text or as a JSON object of :data:`SCHEMA`.

    Raises:
        BlueprintError: the verdict or the refined instruction is not there, or is not clear.
    """
    with telling_reasoning(text):
        return _read(text)


def _read(text: str) -> Triage:
    body = answer_text(text)
    if is_refusal(body):
        raise BlueprintError(f"the designer declines to judge: {body[:60]!r}")
    values = json_values(body, _KNOWN)
    found = find_fields(values, _key_of, _KNOWN, lambda fields: "alignment" in fields)
    if "alignment" not in found:
        inner = next((t for v in values for t in texts_in(v) if states_alignment(t)), None)
        if inner is not None:
            return _read(as_reasoning(inner) if is_reasoning(text) else inner)
    if is_reasoning(text) and not (stands_alone(body) if found else _BEGINNING.match(body)):
        raise BlueprintError("it is no verdict, or not that alone")
    if "alignment" in found:
        return _checked(*_from_fields(found))
    body = without_escapes(body)
    return _checked(find_alignment(body), _instruction(body))


def _checked(alignment: Alignment, instruction: str) -> Triage:
    if alignment == "unstated":
        raise BlueprintError("there is no line 'Alignment: …' with one of the three values")
    if alignment == "misaligned":
        return Triage(alignment, None)
    if not any(letter.isalpha() for letter in instruction):
        raise BlueprintError(f"it says {alignment}, and the refined instruction is missing")
    if is_refusal(instruction):
        raise BlueprintError(f"the refined instruction declines the work: {instruction[:60]!r}")
    if mark := find_mark(instruction):
        raise BlueprintError(f"the refined instruction holds {mark}")
    return Triage(alignment, instruction)


def states_alignment(text: str) -> bool:
    """Whether ``text`` has a line with a verdict."""
    return _ALIGNMENT.search(text) is not None


def find_alignment(body: str, *, end: int | None = None) -> Alignment:
    """The verdict that ``body`` states before its character ``end``.

    Raises:
        BlueprintError: it states several values, such as a copy of the choices.
    """
    found = list(_ALIGNMENT.finditer(body, 0, len(body) if end is None else end))
    values = {_verdict(match["value"]) for match in found}
    if any(match["more"] for match in found) or len(values) > 1:
        raise BlueprintError("the line 'Alignment: …' has to hold exactly one of the three values")
    return values.pop() if values else "unstated"


def _verdict(value: str) -> Alignment:
    value = value.lower()
    if value.startswith(("mis", "not")):
        return "misaligned"
    return "partially aligned" if value.startswith("partially") else "aligned"


def _instruction(body: str) -> str:
    """The last ``Instruction:`` line, or the line after it where it holds nothing itself."""
    found = list(_INSTRUCTION.finditer(body))
    if not found:
        return ""
    first = found[-1]["first"].strip(_AROUND)
    return first or found[-1]["next"].strip(_AROUND)


def _key_of(key: str) -> str | None:
    return _NAMES.get(letters(key))


def _from_fields(found: Mapping[str, Any]) -> tuple[Alignment, str]:
    verdict = find_alignment(f"Alignment: {as_text(found['alignment'])}")
    refined = found.get("refined instruction") or found.get("instruction")
    return verdict, without_escapes(as_text(refined)).strip(_AROUND)
