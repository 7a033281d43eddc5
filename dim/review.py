"""Review: does the painted image show what its plan imagines, and what should be tried next?

A reviewer sees the source, the plan and what was painted. It says what is missing against the
plan's last section, gives a score, accepts the image or wants another one, and may write the plan
anew for that.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dim import headings
from dim.blueprint import SCHEMA as PLAN_SCHEMA
from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from dim.fields import as_text, find_fields, json_values, known_fields, letters, without_escapes
from dim.reading import answer_text, is_refusal, telling_reasoning

BEST = 10
"""The highest score: all of the plan is there, and nothing else has changed."""

_PLAN_KEYS = tuple(PLAN_SCHEMA["properties"])
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "missing": {"type": "string"},
        "score": {"type": "integer"},
        "verdict": {"type": "string", "enum": ["accept", "retry"]},
        **{key: {"type": "string"} for key in _PLAN_KEYS},
    },
    "required": ["missing", "score", "verdict", *_PLAN_KEYS],
    "additionalProperties": False,
}
"""JSON schema of a review, for servers that can keep an answer to one; the plan's fields are empty
where the image is accepted."""

_REQUEST = f"""\
Two images are attached: first a source image, then what a painter made of it. The wish was:
{{instruction}}

The painter sees the source image alone and follows a plan to the letter. The plan was:
{{plan}}

Compare the second image with the plan's last section, which describes how it should look, and \
with the source image in all that was to stay as it is. Write three lines:

Missing: what is missing, wrong or changed without need, the most important first, in one to three \
sentences; a dash if nothing is.
Score: a whole number from 0 (nothing of the plan is there) to {BEST} (all of it is there, and \
nothing else has changed).
Verdict: accept (the image can be handed over) or retry (it has to be painted again).

If the verdict is retry, leave a blank line and write the plan anew: the same five numbered \
sections with the same headings, worded so that the painter gets right what is missing. The \
painter sees the source image alone, so never mention the second image there.

Write plain text and nothing before or after this. If the answer has to be JSON, each line and \
each section is one field, and the sections are empty where the verdict is accept."""

PROMPT_VERSION = hashlib.sha256(f"{_REQUEST}\0{json.dumps(SCHEMA)}".encode()).hexdigest()[:12]
"""Changes exactly when the request does."""

_LINE = r"^[^\w\n]*(?:\d[^\w\n]+)?(?:(?:the|final|overall|my)\s+)*{name}[^\w\n]{{1,9}}"
_VERDICT = re.compile(
    _LINE.format(name="verdict")
    + r"(?P<value>accept(?:ed)?|retry)\b(?P<more>\W{0,6}(?:or\s+)?(?:accept|retry)\b)?",
    re.IGNORECASE | re.MULTILINE,
)
_SCORE = re.compile(
    _LINE.format(name="score") + r"(?P<value>\d{1,3}(?:\.\d+)?)(?:\s*/\s*(?P<of>\d{1,3}))?",
    re.IGNORECASE | re.MULTILINE,
)
_MISSING = re.compile(
    _LINE.format(name="missing") + r"(?P<value>[^\n]*(?:\n(?![\W\d]*(?:score|verdict)\b)[^\n]+)*)",
    re.IGNORECASE | re.MULTILINE,
)
_NOTHING = re.compile(r"\W*(?:nothing|none|n/?a)?\W*", re.IGNORECASE)
_AROUND = " \t\n*_\"'“”‘’`"
_NAMES = {"missing": "missing", "score": "score", "verdict": "verdict"}
_KNOWN = known_fields("missing|score|verdict")


@dataclass(frozen=True)
class Review:
    """What a reviewer thinks of a painted image.

    Attributes:
        accepted: it can be handed over.
        score: from 0 to ``BEST``.
        missing: what is missing or wrong, in words; empty if nothing is.
        blueprint: what to paint from next; ``None``: from the same, or nothing has to be.
        flaw: why the new plan that the reviewer wrote cannot be painted from; empty if it can.
    """

    accepted: bool
    score: float
    missing: str = ""
    blueprint: str | None = None
    flaw: str = ""

    def render(self) -> str:
        """The review as text that ``parse`` reads."""
        verdict = "accept" if self.accepted else "retry"
        lines = f"Missing: {self.missing or '-'}\nScore: {self.score:g}\nVerdict: {verdict}"
        return lines if self.blueprint is None else f"{lines}\n\n{self.blueprint}"


def request_prompt(instruction: str, plan: str) -> str:
    """The text sent to a vision-language model together with source and painted image.

    Args:
        instruction: what the user wished.
        plan: what was painted from: a blueprint, or the instruction itself.
    """
    return _REQUEST.format(instruction=instruction.strip(), plan=plan.strip())


def parse(text: str, *, instruction: str) -> Review:
    """Read a reviewer's answer, in text or as a JSON object of :data:`SCHEMA`.

    Args:
        text: the whole answer.
        instruction: stands in for a missing first section of the new plan.

    Raises:
        BlueprintError: the verdict or the score is not there, or not clear.
    """
    with telling_reasoning(text):
        body = answer_text(text)
        if is_refusal(body):
            raise BlueprintError(f"the reviewer declines to judge: {body[:60]!r}")
        found = find_fields(
            json_values(body, _KNOWN), _key_of, _KNOWN, lambda fields: "verdict" in fields
        )
        body = without_escapes(body)
        lines = _from_fields(found) if found else body
        accepted, score = _verdict(lines), _score(lines)
        missing = _missing(lines)
    if accepted or not (_begins_plan(text) if found else headings.count(body)):
        return Review(accepted, score, missing)
    try:
        plan = Blueprint.parse(text, instruction=instruction).render()
    except BlueprintError as error:
        return Review(accepted, score, missing, flaw=str(error))
    return Review(accepted, score, missing, plan)


def _from_fields(found: Mapping[str, Any]) -> str:
    """The fields as the lines that a text would have."""
    return "\n".join(f"{name}: {' '.join(as_text(value).split())}" for name, value in found.items())


def _verdict(body: str) -> bool:
    found = list(_VERDICT.finditer(body))
    values = {match["value"].lower().startswith("accept") for match in found}
    if len(values) != 1 or any(match["more"] for match in found):
        raise BlueprintError("the line 'Verdict: …' has to hold exactly one of accept and retry")
    return values.pop()


def _score(body: str) -> float:
    found = list(_SCORE.finditer(body))
    values = {(float(match["value"]), float(match["of"] or BEST)) for match in found}
    if len(values) != 1:
        raise BlueprintError(f"the line 'Score: …' has to hold one number from 0 to {BEST}")
    given, most = values.pop()
    if not most or given > most:
        raise BlueprintError(f"a score of {given:g} is more than {most:g}")
    return given / most * BEST


def _missing(body: str) -> str:
    found = _MISSING.search(body)
    said = " ".join(found["value"].split()).strip(_AROUND) if found else ""
    return "" if _NOTHING.fullmatch(said) else said


def _begins_plan(text: str) -> bool:
    """Whether an answer in JSON has a plan's field that says something."""
    plans = known_fields("|".join(_PLAN_KEYS))
    values = json_values(answer_text(text), plans)
    keys = {letters(key): key for key in _PLAN_KEYS}
    fields = find_fields(values, lambda key: keys.get(letters(key)), plans, bool)
    return any(as_text(value).strip() for value in fields.values())


def _key_of(key: str) -> str | None:
    return _NAMES.get(letters(key))
