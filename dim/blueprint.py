"""The blueprint: what a designer is asked, how its answer is read, what a painter is given.

A blueprint is five numbered sections of text. Designers decorate them (bold headings, missing
colons, reasoning in front), so reading is lenient about form and strict about content: all five
sections, once each, in order, none empty. Writing has one form only.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from dim import headings
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
from dim.headings import TITLES
from dim.loose_json import decode
from dim.reading import (
    TAG,
    answer_text,
    as_reasoning,
    is_reasoning,
    is_refusal,
    strip_ending,
    telling_reasoning,
    unify,
)
from dim.triage import Alignment, find_alignment, states_alignment

_KEYS = tuple("_".join(title.lower().split()) for title in TITLES)
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {key: {"type": "string"} for key in _KEYS},
    "required": list(_KEYS),
    "additionalProperties": False,
}
"""JSON schema of a blueprint, for servers that can keep an answer to one: a field per section."""

_IN_FENCE = re.compile(r"```[\w+.-]*\n((?:(?!```).)*)```", re.DOTALL)
_FINISHED = re.compile(r"""[.!?。！？…]["'”’»)\]*_`]*\Z""")
_LABEL = re.compile(r"^[^\w\n]*(?:\d[^\w\n]+)?instruction[*_]*[:：][*_]*\s*", re.IGNORECASE)
_ORDER = re.compile(
    r"\W*(?:add|adjust|apply|blur|change|colou?r|convert|crop|delete|edit|enlarge|erase|extract"
    r"|give|insert|make|modify|move|paint|place|put|raise|recolou?r|remove|replace|restyle|rotate"
    r"|set|shrink|swap|transfer|transform|turn)\s+\w+\s+\w+",
    re.IGNORECASE,
)
_BULLET = re.compile(r"\s*(?:[-*•]|\d+[.)])\s")

_BEGINS_JSON = re.compile(r"[{\[]\s*[\"'“{\[\\]")
_MOST_OF_IT = 4  # headings that make a text a plan: the first section may be missing
_SHORT_KEYS = {
    **{
        letters(name): name for name in ("instruction", "global_layout", "edit_area", "imagination")
    },
    **dict.fromkeys(("localobjects", "localobject"), "local_objects"),
}
_KNOWN = known_fields(rf"{headings.KEYS}|global_?layout|local_?objects?|edit_?area|imagination")


@dataclass(frozen=True)
class Blueprint:
    """An edit, thought through in text. Every field is non-empty text without its heading.

    On construction, line ends are normalised and what is no content is removed: white space and
    horizontal rules around a section, quotation marks around each of them, special tokens of a
    model, and its closing courtesy ("Let me know …"). So ``Blueprint.parse(b.render()) == b`` holds
    for every blueprint that exists.

    Raises:
        BlueprintError: a field is empty, or holds a line that would read as another heading, or
            marks of JSON, which no one writes about a picture.
    """

    instruction: str
    global_layout: str
    local_objects: str
    edit_area: str
    imagination: str

    def __post_init__(self) -> None:
        texts = _tidy_all([getattr(self, field.name) for field in fields(self)])
        for number, (field, text) in enumerate(zip(fields(self), texts, strict=True), start=1):
            _check_section(number, text)
            object.__setattr__(self, field.name, text)

    @classmethod
    def parse(cls, text: str, *, instruction: str | None = None) -> Blueprint:
        """Read a designer's answer, in text or as a JSON object of :data:`SCHEMA`.

        An instruction without its heading, in front of section 2, is section 1 all the same.

        Args:
            text: the answer; reasoning in ``<think>``, ``<answer>`` tags, a code fence and any
                text before the first heading are skipped. Where a line such as ``Final version:``
                parts a draft from what follows, the latter is read. JSON may begin anywhere, under
                any key and within a text, and has to be whole; of several objects one after the
                other the last is read.
            instruction: used as section 1 when the answer starts with section 2. Without it a
                missing first section is an error like any other.

        Raises:
            BlueprintError: names the section that is missing, doubled, out of order or empty, or
                holds JSON; or says that the JSON is cut off or malformed.
        """
        with telling_reasoning(text):
            return _read(cls, *_open(text), instruction)[0]

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
        blueprint where the designer left the first section out or answered in JSON.

    Raises:
        BlueprintError: not misaligned, and not a whole blueprint either: see
            :meth:`Blueprint.parse`; a section stops in mid-sentence, or declines the work.
    """
    with telling_reasoning(text):
        body, found = _open(text)
        alignment = _alignment(body, found)
        if alignment == "misaligned":
            return Answer(alignment, None, None)
        blueprint, words = _read(Blueprint, body, found, instruction)
        _check_meant(blueprint)
    return Answer(alignment, blueprint, words or blueprint.render())


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

_REFERENCE_REQUEST = """\
You plan an image edit for a painter who sees the image and follows your plan to the letter, but \
does not reason on their own.

Two images are attached: first the source image, then the finished edit as a reference. The \
instruction that leads from one to the other is:
{instruction}

{sections}

Never mention the reference image: whoever follows the plan has only the source."""

_AS_JSON = """

If the answer has to be JSON, each section is one field, without its number and heading."""

PROMPT_VERSION = hashlib.sha256(
    "\0".join((_SECTIONS_REQUEST, _SOURCE_REQUEST, _PAIR_REQUEST, _REFINE)).encode()
).hexdigest()[:12]
"""Changes exactly when the wording of the request does; part of every cached answer's key."""

PLAN_VERSION = hashlib.sha256(
    "\0".join(
        (_SECTIONS_REQUEST, _SOURCE_REQUEST, _REFERENCE_REQUEST, _AS_JSON, json.dumps(SCHEMA))
    ).encode()
).hexdigest()[:12]
"""The same for :func:`plan_prompt`."""


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


def plan_prompt(instruction: str, with_target: bool) -> str:
    """The text that asks for a blueprint alone, of an instruction that is known to fit.

    Args:
        instruction: what to do to the source image; refined by the triage where there was one.
        with_target: the target is attached as a reference.
    """
    request = _REFERENCE_REQUEST if with_target else _SOURCE_REQUEST
    sections = _SECTIONS_REQUEST.format(refine="") + _AS_JSON
    return request.format(instruction=instruction.strip(), sections=sections)


def _open(text: str) -> tuple[str, dict[str, Any]]:
    """What an answer says, and its fields if it says it in JSON."""
    body = answer_text(text)
    values = json_values(body, _KNOWN)
    found = find_fields(values, _key_of, _KNOWN, _is_plan)
    if not _is_plan(found):
        inner = _plan_within(values)
        if inner is not None:
            return _open(as_reasoning(inner) if is_reasoning(text) else inner)
        if headings.count(body) >= _MOST_OF_IT:
            found = {}
    if is_reasoning(text):
        _check_nothing_else(body, found)
    return (body if found else without_escapes(body)), found


def _plan_within(values: Sequence[Any]) -> str | None:
    """The text within JSON that is a plan, or says that there can be none."""
    texts = {text for value in values for text in texts_in(value)}
    plans = [t for t in texts if headings.count(without_escapes(t)) >= _MOST_OF_IT]
    plans = plans or [text for text in texts if states_alignment(text)]
    # Texts side by side count as one too, which then holds the one that matters.
    shortest = [t for t in plans if not any(other != t and other in t for other in plans)]
    if len(shortest) > 1:
        raise BlueprintError("the answer holds several texts and does not say which is meant")
    return shortest[0] if shortest else None


def _check_nothing_else(body: str, found: Mapping[str, Any]) -> None:
    """Thoughts about a plan are no plan: where reasoning belongs, the plan has to stand alone."""
    alone = (
        stands_alone(body)
        if found
        else headings.first_heading(body) == 0 or states_alignment(body.partition("\n")[0])
    )
    if not alone:
        raise BlueprintError("it is no plan, or not that alone")


def _alignment(body: str, found: Mapping[str, Any]) -> Alignment:
    if not found:
        return find_alignment(body, end=headings.first_heading(body))
    front = _BEGINS_JSON.split(body, maxsplit=1)[0]
    return find_alignment(f"{front}\nAlignment: {as_text(found.get('alignment'))}")


def _read(
    cls: type[Blueprint], body: str, found: Mapping[str, Any], instruction: str | None
) -> tuple[Blueprint, str | None]:
    """The blueprint, and the designer's own words where they are all five sections."""
    if found:
        return cls(*_from_fields(found, instruction)), None
    instruction = instruction or _unlabelled_instruction(body)
    cut = headings.split(body, may_lack_first=instruction is not None)
    texts = [_from_value(text) for text in cut.texts]
    if len(texts) < len(TITLES):
        return cls(str(instruction), *texts), None
    return cls(*texts), cut.words if texts == list(cut.texts) else None


def _unlabelled_instruction(body: str) -> str | None:
    """One sentence in front of section 2 that can only be the instruction without its heading."""
    front = _LABEL.sub("", body[: headings.first_heading(body)].strip()).strip('*_"“” ')
    is_order = _ORDER.match(front) and "\n" not in front and not front.endswith((":", "："))
    return front if is_order else None


def _key_of(key: str) -> str | None:
    section = headings.section_of(key)
    if section is not None:
        return _KEYS[section - 1]
    name = letters(key)
    return "alignment" if name.startswith("alignment") else _SHORT_KEYS.get(name)


def _is_plan(found: Mapping[str, Any]) -> bool:
    """Whether there are two of the sections that a triage does not have."""
    return sum(text is not None for text in _sections(found)[1:]) > 1


def _sections(found: Mapping[str, Any]) -> list[Any]:
    """The five sections, by title or else by the name of the blueprint's field."""
    names = [field.name for field in fields(Blueprint)]
    return [found.get(key, found.get(name)) for key, name in zip(_KEYS, names, strict=True)]


def _from_fields(found: Mapping[str, Any], instruction: str | None) -> list[str]:
    texts = _sections(found)
    if texts.count(None) == len(TITLES):
        raise BlueprintError("none of the five section headings is there")
    texts[0] = texts[0] or instruction
    for number, text in enumerate(texts, 1):
        if text is None:
            raise BlueprintError(f"{headings.name(number)} is missing")
    return [_from_field(number, text) for number, text in enumerate(texts, 1)]


def _from_field(number: int, value: Any) -> str:
    """A section from its value, which may repeat its heading and number."""
    if isinstance(value, bool | int | float):
        raise BlueprintError(f"{headings.name(number)} is no text: {value!r:.20}")
    if isinstance(value, dict):
        value = {key: v for key, v in value.items() if not _is_label(number, key, v)}
    return headings.without_own(number, without_escapes(as_text(value)).strip())


def _is_label(number: int, key: str, value: Any) -> bool:
    if letters(key) == "type":
        return value in ("string", "text")
    return str(value) == str(number) or (
        isinstance(value, str) and headings.section_of(value) == number
    )


def _from_value(text: str) -> str:
    """A section in text, which may be JSON itself."""
    whole = text.strip()
    if not stands_alone(whole):
        return text
    try:
        value, end = decode(whole)
    except ValueError:
        return text
    return as_text(value) if end == len(whole) else text


def _check_section(number: int, text: str) -> None:
    if not text:
        raise BlueprintError(f"{headings.name(number)} is empty")
    other = headings.find_numbered(text.partition("\n")[2])
    if other is not None:
        raise BlueprintError(f"{headings.name(number)} holds the heading of {headings.name(other)}")
    if tag := TAG.search(text):
        raise BlueprintError(f"{headings.name(number)} holds the tag {tag[0]!r}")
    if headings.has_own_element(text):
        raise BlueprintError(f"{headings.name(number)} holds an element named after a section")
    if mark := find_mark(text):
        raise BlueprintError(f"{headings.name(number)} holds {mark}")
    if _KNOWN.search(text) or find_fields(json_values(text, _KNOWN), _key_of, _KNOWN, _is_plan):
        raise BlueprintError(f"{headings.name(number)} holds another plan in JSON")


def _check_meant(blueprint: Blueprint) -> None:
    """What a person writes on purpose and a designer only when something went wrong."""
    texts = [getattr(blueprint, field.name) for field in fields(blueprint)]
    for number, text in enumerate(texts, 1):
        if not any(letter.isalpha() for letter in text):
            raise BlueprintError(f"{headings.name(number)} holds no words: {text[:20]!r}")
        if is_refusal(text):
            raise BlueprintError(f"{headings.name(number)} declines the work: {text[:60]!r}")
    if _stops_short(blueprint):
        line = blueprint.imagination.rpartition("\n")[2]
        raise BlueprintError(f"{headings.name(len(TITLES))} stops in mid-sentence: {line[-40:]!r}")


def _stops_short(blueprint: Blueprint) -> bool:
    """Whether the last sentence has no end where those of other sections have one."""
    before, _, line = blueprint.imagination.rpartition("\n")
    punctuated = all(_FINISHED.search(t) for t in (blueprint.global_layout, blueprint.edit_area))
    is_sentence = not before or len(line.split()) > 3  # a shorter line may be a closing remark
    above = before.rpartition("\n")[2]
    in_open_list = _BULLET.match(line) and not (_BULLET.match(above) and _FINISHED.search(above))
    return punctuated and is_sentence and not _FINISHED.search(line) and not in_open_list


def _tidy_all(texts: Sequence[str]) -> list[str]:
    while True:
        texts = [_tidy(text, last=number == len(TITLES)) for number, text in enumerate(texts, 1)]
        if not all(len(text) > 2 and text.startswith('"') for text in texts):
            return texts
        for number, text in enumerate(texts, 1):
            if not text.endswith('"'):
                raise BlueprintError(
                    f"{headings.name(number)} has a quotation mark that stays open"
                )
        texts = [text[1:-1] for text in texts]


def _tidy(text: str, *, last: bool) -> str:
    text = "\n".join(line.rstrip() for line in unify(text).split("\n")).strip()
    if fenced := _IN_FENCE.fullmatch(text):
        text = fenced[1].strip()
    while (shorter := headings.without_block(text).strip()) != text:
        text = shorter
    return strip_ending(text, courtesy=last)
