"""The long caption of DIM-T2I: what a captioner is asked, and what counts as an answer."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from dim.blueprint import answer_text
from dim.errors import BlueprintError, DesignerError

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

_REQUEST = """\
Describe the attached image so precisely that someone could repaint it without seeing it.

Look at each of these aspects, and write about those that the image shows: {dimensions}.

Write one flowing paragraph of about 150 words, in English. State only what is visible, begin with \
the main subject, quote written text exactly, and leave out aspects that do not occur. Do not \
mention these directions, and do not write a list or a heading."""

PROMPT_VERSION = hashlib.sha256("\0".join((_REQUEST, *DIMENSIONS)).encode()).hexdigest()[:12]
"""Changes exactly when the wording of the request does; part of every cached answer's key."""

_REFUSAL = re.compile(
    r"^\W*(?:i(?:['’]m| am) (?:sorry|unable|not able)|sorry\b|i (?:can(?:no|['’])t|cannot)\b"
    r"|as an ai\b|unfortunately, i\b)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class CaptionFault:
    """Why a caption is not kept: a reason code, and the number beside the limit it misses."""

    reason: str
    detail: str
    value: float | None = None
    threshold: float | None = None


def request_prompt() -> str:
    """The text sent to a vision-language model together with the image."""
    return _REQUEST.format(dimensions=", ".join(DIMENSIONS))


def parse(text: str) -> str:
    """The caption in an answer, as one paragraph; reasoning, tags and fences are left out.

    Raises:
        DesignerError: there is no text left.
    """
    try:
        return " ".join(answer_text(text).split())
    except BlueprintError as error:
        raise DesignerError(str(error)) from None


def find_fault(caption: str, *, min_words: int, max_words: int) -> CaptionFault | None:
    """The first rule that ``caption`` breaks: a refusal, or too few or too many words."""
    if _REFUSAL.match(caption):
        return CaptionFault("caption.refusal", "the captioner declined to describe the image")
    words = len(caption.split())
    if words < min_words:
        return CaptionFault("caption.too_short", f"{words} words", words, min_words)
    if words > max_words:
        return CaptionFault("caption.too_long", f"{words} words", words, max_words)
    return None
