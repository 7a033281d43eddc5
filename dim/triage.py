"""Triage: does the instruction say what really differs between source and target?

A *misaligned* instruction is dropped, a *partially aligned* one gets the changes it leaves out, an
*aligned* one is made unambiguous. The last two yield a refined instruction to plan from.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import Any, Literal

from dim.errors import BlueprintError
from dim.reading import answer_text, as_text, is_refusal, json_object

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
    body = answer_text(text)
    if is_refusal(body):
        raise BlueprintError(f"the designer declines to judge: {body[:60]!r}")
    alignment, instruction = _from_json(body) or (find_alignment(body), _instruction(body))
    if alignment == "unstated":
        raise BlueprintError("there is no line 'Alignment: …' with one of the three values")
    if alignment == "misaligned":
        return Triage(alignment, None)
    if not any(letter.isalpha() for letter in instruction):
        raise BlueprintError(f"it says {alignment}, and the refined instruction is missing")
    if is_refusal(instruction):
        raise BlueprintError(f"the refined instruction declines the work: {instruction[:60]!r}")
    return Triage(alignment, instruction)


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


def _from_json(body: str) -> tuple[Alignment, str] | None:
    answer = json_object(body)
    if answer is None:
        return None
    known = {key.lower(): as_text(value).strip() for key, value in answer.items()}
    verdict = find_alignment(f"Alignment: {known.get('alignment', '')}")
    return verdict, known.get("refined_instruction") or known.get("instruction", "")
