"""The long caption of DIM-T2I: what a captioner is asked, and what counts as an answer.

The request asks for one field per dimension. The fields that the image has something to say about
are joined to one caption, so that it is known which dimensions it covers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dim.cues import spoken_of
from dim.errors import BlueprintError, DesignerError
from dim.fields import (
    as_text,
    find_fields,
    find_mark,
    json_values,
    known_fields,
    letters,
    stands_alone,
    text_under,
    without_escapes,
)
from dim.reading import answer_text, is_reasoning, is_refusal, telling_reasoning

DIMENSIONS = (
    "spatial relations",
    "counts",
    "relative sizes",
    "colours",
    "materials",
    "shapes",
    "textures",
    "human actions",
    "interactions between objects",
    "facial expressions",
    "kind of scene",
    "weather",
    "lighting",
    "time of day",
    "written text and signs",
    "brands and logos",
    "mood",
    "artistic style",
    "cultural setting",
    "depth and occlusion",
    "perspective",
)
"""The 21 aspects that a caption looks at, as the paper groups them."""

Language = Literal["en", "zh", "any"]
"""What a caption has to be written in."""

_OPENING = "main subject"
_NOT_PRESENT = "not present"
_FIELDS = tuple(name.replace(" ", "_") for name in (_OPENING, *DIMENSIONS))

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {field: {"type": "string"} for field in _FIELDS},
    "required": list(_FIELDS),
    "additionalProperties": False,
}
"""JSON schema of an answer, for servers that can keep to one: a field per dimension."""

_REQUEST = """\
Describe the attached image so precisely that someone could repaint it without seeing it.

Write one line for each of these aspects, in this order, as "aspect: text":
{lines}

Each text is one or two full sentences in {language} that name the things they speak of, so \
that all lines read one after the other make one description of about 150 words. State only what \
is visible, do not repeat what an earlier line says, and quote written text exactly. Where the \
image has nothing of an aspect, write "{not_present}". Never write that this is an image or what \
it shows; describe the things themselves.

Write plain text and nothing before or after these lines. If the answer has to be JSON, each line \
is one field."""

PROMPT_VERSION = hashlib.sha256(
    "\0".join((_REQUEST, *DIMENSIONS, json.dumps(SCHEMA))).encode()
).hexdigest()[:12]
"""Changes exactly when the request does; part of every cached answer's key."""

_ABSENT = re.compile(
    r"^\W*(?:(?:not (?:present|visible|applicable|shown|specified|discernible)|none|nothing)"
    r"\b[^.]{0,60}|n/?a|absent|null|no)?\W*$"
    r"|^\W*(?:there (?:is|are) )?no\b[^.]*\b(?:visible|present|shown|seen|discernible|identifiable"
    r"|apparent|depicted)\b[^.]*\W*$"
    r"|^\W*(?:there (?:is|are) )?no (?:[\w-]+ ){0,2}(?:people|persons?|humans?|faces?|texts?|signs?"
    r"|logos?|brands?|expressions?|actions?|interactions?)\W*$",
    re.IGNORECASE,
)
_LABEL = re.compile(
    rf"^[^\w\n]*(?:\d+[^\w\n]+)?(?P<name>{'|'.join(f.replace('_', '[_ ]') for f in _FIELDS)})"
    r"[^\w\n:：]{0,4}[:：][*_]{0,3}[^\S\n]*",
    re.IGNORECASE | re.MULTILINE,
)
_FEWEST_LABELS = 3  # fewer are prose that happens to begin a line so
_BY_LETTERS = {
    spelling: field
    for field in _FIELDS
    for spelling in (letters(field), letters(field).replace("colour", "color"))
}
_NAMED = re.compile(r"\w{0,30}(?:caption|description)s?")
_WHOLE = re.compile(r"\w{0,30}(?:prompt|text|answer|response|output|result|content)s?")
_TAG = re.compile(r"<(\w{0,20}(?:caption|description))>", re.IGNORECASE)
_KNOWN = known_fields(
    "|".join(field.replace("_", r"[\s_-]*") for field in _FIELDS)
    + r"|colors|(?:\w{1,30}[\s_])?(?:caption|description)"
)
_QUOTED = re.compile(r"\"[^\"\n]*\"|“[^”\n]*”|「[^」\n]*」|‘[^’\n]*’(?!\w)")
_SENTENCE = re.compile(r"[^.!?。！？]+(?:[.!?](?!\s|$)[^.!?。！？]*)*[.!?。！？]*[\"”’)]*\s*")
_HAN = "\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_HAN}\u3040-\u30ff]|[^\W_{_HAN}\u3040-\u30ff]+(?:['’-][^\W_]+)*")
_HAN_WORD = re.compile(rf"[{_HAN}]")
_ENGLISH = frozenset((
    "a", "an", "and", "are", "as", "at", "by", "for", "from", "has", "have", "his", "her", "in",
    "is", "it", "its", "of", "on", "or", "that", "the", "their", "there", "this", "to", "under",
    "up", "was", "which", "while", "with",
))  # fmt: skip
_BOILERPLATE = re.compile(
    r"\b(?:(?:the|this) (?:image|picture|photo(?:graph)?|scene)(?: also)? (?:shows|depicts|features"
    r"|captures|presents|displays|contains|portrays|is of)"
    r"|in (?:the|this) (?:image|picture|photo(?:graph)?)\b"
    r"|(?:we|you|one) can see|(?:can be|is|are) seen in the (?:image|picture|photo))"
    r"|图[片像](?:展示|显示|描绘|中)|这[张幅]图",
    re.IGNORECASE,
)
_LOOP = 8  # words in a row; said twice, they are no coincidence
_LATIN_SHARE = 0.9  # of the letters of English text
_ENGLISH_SHARE = 0.1  # of its words that are of the commonest; real long captions have 0.32 to 0.45
_HAN_SHARE = 0.5  # of the words of Chinese text, which may hold numbers and names


@dataclass(frozen=True)
class Caption:
    """A caption, and the dimensions it covers.

    ``by_field`` says that the captioner answered per dimension; else ``covered`` is an estimate
    from the words of the text, and no more than a lower bound.
    """

    text: str
    covered: tuple[str, ...]
    by_field: bool


@dataclass(frozen=True)
class CaptionFault:
    """Why a caption is not kept: a reason code, and the number beside the limit it misses."""

    reason: str
    detail: str
    value: float | None = None
    threshold: float | None = None


def request_prompt(language: Language = "en") -> str:
    """The text sent to a vision-language model together with the image."""
    lines = "\n".join((_OPENING, *DIMENSIONS))
    wanted = "Chinese" if language == "zh" else "English"
    return _REQUEST.format(lines=lines, not_present=_NOT_PRESENT, language=wanted)


def parse(text: str) -> str:
    """The caption in an answer, as one paragraph; see :func:`read`."""
    return read(text).text


def read(text: str) -> Caption:
    """Read an answer: a JSON object of :data:`SCHEMA`, a line per dimension, or plain prose.

    Reasoning, tags and fences are left out, dimensions that the image has nothing of too.

    Raises:
        DesignerError: there is no text left, or it is JSON of another kind or cut off.
    """
    try:
        with telling_reasoning(text):
            caption = _read(text)
            if mark := find_mark(caption.text):
                raise BlueprintError(f"the caption holds {mark}")
    except BlueprintError as error:
        raise DesignerError(str(error)) from None
    return caption


def _read(text: str) -> Caption:
    body = answer_text(text)
    values = json_values(body, _KNOWN)
    found = find_fields(values, _key_of, _KNOWN, lambda fields: len(fields) >= _FEWEST_LABELS)
    if is_reasoning(text) and not (stands_alone(body) if found else _LABEL.match(body)):
        raise BlueprintError("it is no list of aspects, or not that alone")
    if found:
        return _assemble({field: _sentences_of(value) for field, value in found.items()})
    if values and (body[0] in "{[" or _text_under(values, _NAMED)):
        return _prose(_whole(values))
    body = without_escapes(_tagged(body))
    labels = list(_LABEL.finditer(body))
    if len(labels) >= _FEWEST_LABELS:
        ends = [label.start() for label in labels[1:]] + [len(body)]
        spans = zip(labels, ends, strict=True)
        return _assemble({_field(m["name"]): body[m.end() : end] for m, end in spans})
    return _prose(body)


def _tagged(body: str) -> str:
    """What stands between ``<caption>`` and its end, or all of it."""
    tag = _TAG.search(body)
    end = body.rfind(f"</{tag[1]}>") if tag else -1
    return body[tag.end() : end] if tag and end > tag.end() else body


def _key_of(key: str) -> str | None:
    return _BY_LETTERS.get(letters(key))


def _whole(values: Sequence[Any]) -> str:
    """The one text of an answer in JSON that is not by dimension."""
    text = _text_under(values, _NAMED) or _text_under(values, _WHOLE)
    if text is None:
        raise BlueprintError("the answer is JSON without any of the fields that were asked for")
    return without_escapes(text)


def _text_under(values: Sequence[Any], wanted: re.Pattern[str]) -> str | None:
    return next((text for value in reversed(values) if (text := text_under(value, wanted))), None)


def _sentences_of(value: Any) -> str:
    """A field's value; what it lists is said one after the other."""
    parts = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list):
        return without_escapes(as_text(value))
    said = [text for part in parts if (text := _sentences_of(part).strip())]
    return " ".join(_as_sentence(text) for text in said)


def _field(name: str) -> str:
    return "_".join(name.lower().split())


def _assemble(values: dict[str, str]) -> Caption:
    """One paragraph of the fields that say something; a sentence said before is left out."""
    said: dict[str, str] = {}
    covered = []
    for field, dimension in zip(_FIELDS, (_OPENING, *DIMENSIONS), strict=True):
        value = " ".join(values.get(field, "").split()).strip("*_ ")
        if _ABSENT.match(value):
            continue
        if dimension != _OPENING:
            covered.append(dimension)
        for sentence in _sentences(_as_sentence(value)):
            said.setdefault(sentence.casefold(), sentence)
    text = " ".join(said.values())
    if not text:
        raise DesignerError("the answer says of every aspect that it is not present")
    return Caption(text, tuple(covered), by_field=True)


def _as_sentence(text: str) -> str:
    text = text[0].upper() + text[1:]
    return text if text.rstrip("\"”’')")[-1:] in ".!?。！？" else f"{text}."


def _prose(text: str) -> Caption:
    text = " ".join(text.split())
    return Caption(text, spoken_of(text), by_field=False)


def find_fault(
    caption: str | Caption,
    *,
    min_words: int,
    max_words: int,
    min_dimensions: int = 0,
    min_dimensions_in_prose: int = 0,
    language: Language = "any",
    max_repetition: float = 1.0,
    max_boilerplate: float = 1.0,
) -> CaptionFault | None:
    """The first rule that ``caption`` breaks.

    Args:
        caption: the text, or what :func:`read` made of an answer.
        min_words: and ``max_words``: how long it may be; a Chinese character counts as a word.
        min_dimensions: how many it covers at least, where the captioner answered per dimension.
        min_dimensions_in_prose: the same for plain prose, of which they can only be estimated.
        language: what it is in, judged by script and, for English, by how common its words are;
            quoted text may be in any.
        max_repetition: largest share of its words within a run of eight that came before.
        max_boilerplate: largest share of its sentences that speak of "the image" instead.
    """
    caption = caption if isinstance(caption, Caption) else _prose(caption)
    plain = _QUOTED.sub(" ", caption.text)
    if is_refusal(plain):
        return CaptionFault("caption.refusal", "the captioner declined to describe the image")
    words = _words(caption.text)
    if len(words) < min_words:
        return _fault("too_short", f"{len(words)} words", len(words), min_words)
    if len(words) > max_words:
        return _fault("too_long", f"{len(words)} words", len(words), max_words)
    repeated = _repetition(words)
    if repeated > max_repetition:
        return _fault("repetition", "it repeats itself", repeated, max_repetition)
    fault = _language_fault(plain, language)
    if fault is not None:
        return fault
    empty = _boilerplate(plain)
    if empty > max_boilerplate:
        detail = "it speaks of the image instead of what is in it"
        return _fault("boilerplate", detail, empty, max_boilerplate)
    needed = min_dimensions if caption.by_field else min_dimensions_in_prose
    if len(caption.covered) < needed:
        detail = f"it covers {len(caption.covered)} of {len(DIMENSIONS)} dimensions"
        return _fault("few_dimensions", detail, len(caption.covered), needed)
    return None


def _fault(code: str, detail: str, value: float, threshold: float) -> CaptionFault:
    return CaptionFault(f"caption.{code}", detail, value, threshold)


def _language_fault(text: str, language: Language) -> CaptionFault | None:
    if language == "any":
        return None
    words = _words(text)
    if language == "zh":
        han = _share(_HAN_WORD.match(word) for word in words)
        return None if han >= _HAN_SHARE else _fault("language", "not Chinese", han, _HAN_SHARE)
    letters = [letter for letter in text if letter.isalpha()]
    latin = _share(letter <= "\u024f" for letter in letters)
    if latin < _LATIN_SHARE:
        return _fault("language", "not in Latin script", latin, _LATIN_SHARE)
    common = _share(word in _ENGLISH for word in words)
    if common < _ENGLISH_SHARE:
        return _fault("language", "too few English words", common, _ENGLISH_SHARE)
    return None


def _share(answers: Iterable[object]) -> float:
    """The share of ``answers`` that are true; 0 of none."""
    given = [bool(answer) for answer in answers]
    return sum(given) / max(len(given), 1)


def _repetition(words: list[str]) -> float:
    """The share of words that lie in a run of ``_LOOP`` words which was there before."""
    repeated = [False] * len(words)
    seen: Counter[tuple[str, ...]] = Counter()
    for start in range(len(words) - _LOOP + 1):
        run = tuple(words[start : start + _LOOP])
        seen[run] += 1
        if seen[run] > 1:
            repeated[start : start + _LOOP] = [True] * _LOOP
    return _share(repeated)


def _boilerplate(text: str) -> float:
    return _share(_BOILERPLATE.search(sentence) for sentence in _sentences(text))


def _sentences(text: str) -> Iterator[str]:
    return (found for part in _SENTENCE.findall(text) if (found := part.strip()))


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]
