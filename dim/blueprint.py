"""The blueprint: what a designer is asked, how its answer is read, what a painter is given.

A blueprint is five numbered sections of text. Designers decorate them (bold headings, missing
colons, reasoning in front), so reading is lenient about form and strict about content: all five
sections, once each, in order, none empty. Writing has one form only.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from dim.errors import BlueprintError

TITLES = (
    "Edit Instruction",
    "Global Layout Perception",
    "Local Object Perception",
    "Edit Area Localization",
    "Edited Image Imagination",
)
"""Headings of sections 1 to 5, in the order of the fields of :class:`Blueprint`."""

Alignment = Literal["aligned", "partially aligned", "misaligned", "unstated"]
"""How an instruction fits its image pair; ``unstated`` when the designer was not asked."""

_TITLE = "|".join(title.replace(" ", r"[ \t]+") for title in TITLES)
_HEADING = re.compile(
    rf"""
    ^[^\S\n]*(?:[>#]+[^\S\n]*|[-•][^\S\n]+|\*[^\S\n]+)*     # quote, hash or bullet in front
    (?P<open>[*_]{{0,3}})
    (?:(?:step|section)?[ \t]*(?P<number>\d)[ \t]*[.):][ \t]*)?
    (?P<inner>[*_]{{0,3}})
    (?P<title>{_TITLE})
    (?P<close>[*_]{{0,3}})
    [ \t]*
    (?P<end>:|[-–—](?=\s)|(?=\s|\Z))
    """,
    re.IGNORECASE | re.MULTILINE | re.VERBOSE,
)
_REASONING = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.IGNORECASE | re.DOTALL)
_TAG = re.compile(r"</?(?:think|thinking|answer)>", re.IGNORECASE)
_THINK_OPEN = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_THINK_CLOSE = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_ANSWER_OPEN = re.compile(r"<answer>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(r"</answer>", re.IGNORECASE)
_ALIGNMENT = re.compile(
    r"^\W*alignment\W+(?P<value>partially[ _-]*aligned|mis-?aligned|not[ _-]*aligned|aligned)\b",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Blueprint:
    """An edit, thought through in text. Every field is non-empty text without its heading.

    Line ends are normalised and surrounding white space is removed on construction, so that
    ``Blueprint.parse(b.render()) == b`` holds for every blueprint that exists.

    Raises:
        BlueprintError: a field is empty, or holds a line that would read as another heading.
    """

    instruction: str
    global_layout: str
    local_objects: str
    edit_area: str
    imagination: str

    def __post_init__(self) -> None:
        for number, field in enumerate(fields(self), start=1):
            text = _tidy(getattr(self, field.name))
            _check_section(number, text)
            object.__setattr__(self, field.name, text)

    @classmethod
    def parse(cls, text: str, *, instruction: str | None = None) -> Blueprint:
        """Read a designer's answer.

        Args:
            text: the answer; reasoning in ``<think>``, ``<answer>`` tags, a code fence and any
                text before the first heading are skipped.
            instruction: used as section 1 when the answer starts with section 2. Without it a
                missing first section is an error like any other.

        Raises:
            BlueprintError: names the section that is missing, doubled, out of order or empty.
        """
        body = answer_text(text)
        sections = _sections(body, may_lack_first=instruction is not None)
        if len(sections) == len(TITLES) - 1:
            sections = [str(instruction), *sections]
        return cls(*sections)

    def render(self) -> str:
        """The five numbered sections, one blank line apart: the text a painter is trained on."""
        values = (getattr(self, field.name) for field in fields(self))
        parts = zip(TITLES, values, strict=True)
        return "\n\n".join(f"{n}. {title}: {text}" for n, (title, text) in enumerate(parts, 1))


@dataclass(frozen=True)
class Answer:
    """A designer's answer, read: its triage, its blueprint, and the blueprint in its own words.

    ``blueprint`` and ``words`` are ``None`` exactly when the answer says *misaligned*.
    """

    alignment: Alignment
    blueprint: Blueprint | None
    words: str | None


def parse_answer(text: str, *, instruction: str) -> Answer:
    """Read an answer that may open with an ``Alignment:`` line.

    Args:
        text: the designer's whole answer.
        instruction: what was asked; stands in for a missing first section.

    Returns:
        The answer. ``words`` is the designer's own text from its first heading on, or the rendered
        blueprint where the designer left the first section out.

    Raises:
        BlueprintError: not misaligned, and not a blueprint either.
    """
    body = answer_text(text)
    alignment = _alignment(body)
    if alignment == "misaligned":
        return Answer(alignment, None, None)
    blueprint = Blueprint.parse(body, instruction=instruction)
    try:
        headings = _find_headings(body, may_lack_first=False)
    except BlueprintError:
        return Answer(alignment, blueprint, blueprint.render())
    return Answer(alignment, blueprint, body[headings[0].start() :].strip())


def answer_text(text: str) -> str:
    """The part of an answer that is meant: no reasoning, no tags, no code fence around it.

    Raises:
        BlueprintError: the answer is empty, or stops within its reasoning.
    """
    text = _REASONING.sub("", _unify_lines(text))
    *_, text = _THINK_CLOSE.split(text)
    if _THINK_OPEN.search(text):
        raise BlueprintError("the answer ends within its reasoning (<think> is never closed)")
    *_, text = _ANSWER_OPEN.split(text)
    text = _ANSWER_CLOSE.split(text)[0].strip()
    if text.startswith("```"):
        text = text.partition("\n")[2].removesuffix("```").rstrip()
    if not text:
        raise BlueprintError("the answer is empty")
    return text


_SECTIONS_REQUEST = """\
Write the edit plan as exactly five numbered sections, with these headings and in this order:

1. Edit Instruction: the instruction as one complete and unambiguous sentence{refine}.
2. Global Layout Perception: the scene as a whole; its key objects and where each of them is.
3. Local Object Perception: every relevant object, one by one, with its shape, colour, material, \
texture, size, state and any text on it.
4. Edit Area Localization: which objects or regions change, where they are, and what must stay \
exactly as it is.
5. Edited Image Imagination: how the finished image looks, described as if you saw it, the parts \
that stay included.

Describe only what is visible. Write plain text and nothing before or after the plan."""

_SOURCE_REQUEST = """\
You plan an image edit for a painter who sees the image and follows your plan to the letter, but \
does not reason on their own.

The attached image is the source image. The instruction is:
{instruction}

{sections}"""

_PAIR_REQUEST = """\
You plan an image edit for a painter who sees the image and follows your plan to the letter, but \
does not reason on their own.

Two images are attached: first the source image, then the finished edit as a reference. The \
instruction that is said to lead from one to the other is:
{instruction}

First compare the instruction with what really differs between the two images, and write one line:
Alignment: aligned (the instruction describes the differences), partially aligned (it describes \
only some of them) or misaligned (it describes something else, or nothing differs).
Use only one of these three values. If it is misaligned, stop there.

Then leave a blank line. {sections}

Never mention the reference image: whoever follows the plan has only the source."""

_REFINE = "; make it specific, and add every visible change that it leaves out"

PROMPT_VERSION = hashlib.sha256(
    "\0".join((_SECTIONS_REQUEST, _SOURCE_REQUEST, _PAIR_REQUEST, _REFINE)).encode()
).hexdigest()[:12]
"""Changes exactly when the wording of the request does; part of every cached answer's key."""


def request_prompt(instruction: str, with_target: bool) -> str:
    """The text sent to a vision-language model together with the image or images.

    Args:
        instruction: what to do to the source image.
        with_target: also ask how well the instruction fits the pair (data making only: at
            inference there is no target).
    """
    sections = _SECTIONS_REQUEST.format(refine=_REFINE if with_target else "")
    request = _PAIR_REQUEST if with_target else _SOURCE_REQUEST
    return request.format(instruction=instruction.strip(), sections=sections)


def _alignment(body: str) -> Alignment:
    heading = _HEADING.search(body)
    found = _ALIGNMENT.search(body, 0, heading.start() if heading else len(body))
    if not found:
        return "unstated"
    value = found["value"].lower()
    if value.startswith(("mis", "not")):
        return "misaligned"
    return "partially aligned" if value.startswith("partially") else "aligned"


def _sections(body: str, *, may_lack_first: bool) -> list[str]:
    headings = _find_headings(body, may_lack_first=may_lack_first)
    ends = [heading.start() for heading in headings[1:]] + [len(body)]
    return [_section_text(body, heading, end) for heading, end in zip(headings, ends, strict=True)]


def _find_headings(body: str, *, may_lack_first: bool) -> Sequence[re.Match[str]]:
    """The headings in order; a line of prose that looks like one yields to a numbered heading."""
    found = list(_HEADING.finditer(body))
    numbered = [heading for heading in found if heading["number"]]
    exact = [heading for heading in numbered if int(heading["number"]) == _section(heading)]
    exact = [heading for heading in exact if heading["end"]]
    marked = [heading for heading in found if heading["number"] or _stands_out(body, heading)]
    complete = list(range(1, len(TITLES) + 1))
    for wanted in [complete, complete[1:]] if may_lack_first else [complete]:
        for headings in (exact, numbered, marked):
            if [_section(heading) for heading in headings] == wanted:
                return headings
    raise BlueprintError(_what_is_wrong([_section(heading) for heading in marked], may_lack_first))


def _section(heading: re.Match[str]) -> int:
    words = " ".join(heading["title"].split()).lower()
    return [title.lower() for title in TITLES].index(words) + 1


def _stands_out(body: str, heading: re.Match[str]) -> bool:
    """A heading without number has a colon or is alone on its line; else it is prose."""
    rest = body[heading.end() :].partition("\n")[0]
    return bool(heading["end"]) or not rest.strip(" \t*_:")


def _section_text(body: str, heading: re.Match[str], end: int) -> str:
    text = body[heading.end() : end]
    marker = (heading["open"] + heading["inner"]).replace("_", "*")
    if marker:
        text = _close_emphasis(text, closed=bool(heading["close"]), marker=marker)
    if not text.partition("\n")[0].strip():
        text = textwrap.dedent(text.partition("\n")[2])
    return text


def _close_emphasis(text: str, *, closed: bool, marker: str) -> str:
    """Drop the end of a bold heading, which may come after its colon or after the whole section."""
    if closed:
        return text.removeprefix(":") if text.startswith(":") else text
    start = text.lstrip(" \t")
    for mark in (marker, marker.replace("*", "_")):
        if start.startswith(mark):
            return start[len(mark) :].removeprefix(":")
        if text.rstrip().endswith(mark):
            return text.rstrip().removesuffix(mark)
    return text


def _what_is_wrong(found: list[int], may_lack_first: bool) -> str:
    if not found:
        return "none of the five section headings is there"
    required = range(2 if may_lack_first else 1, len(TITLES) + 1)
    missing = [number for number in required if number not in found]
    if missing:
        names = ", ".join(_name(number) for number in missing)
        return f"{names} {'is' if len(missing) == 1 else 'are'} missing"
    doubled = [number for number in sorted(set(found)) if found.count(number) > 1]
    if doubled:
        return f"{_name(doubled[0])} appears {found.count(doubled[0])} times"
    late = next(b for a, b in zip(found, found[1:], strict=False) if b < a)
    return f"{_name(late)} is out of order (sections found: {', '.join(map(str, found))})"


def _name(number: int) -> str:
    return f"section {number} ({TITLES[number - 1]})"


def _check_section(number: int, text: str) -> None:
    if not text:
        raise BlueprintError(f"{_name(number)} is empty")
    later_lines = text.partition("\n")[2]
    for heading in _HEADING.finditer(later_lines):
        if heading["number"]:
            raise BlueprintError(f"{_name(number)} holds the heading of {_name(_section(heading))}")
    if _TAG.search(text):
        raise BlueprintError(f"{_name(number)} holds the tag {_TAG.search(text)[0]!r}")  # type: ignore[index]


def _tidy(text: str) -> str:
    return "\n".join(line.rstrip() for line in _unify_lines(text).split("\n")).strip()


def _unify_lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")
