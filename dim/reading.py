"""What a language model meant to answer, taken out of what it wrote around it."""

from __future__ import annotations

import json
import re
from typing import Any

from dim.errors import BlueprintError

_THINK = r"(?:think|thinking|thought|reasoning|reflection)"
_ANSWER = r"(?:answer|final_answer|output|response)"
_THINK_TAG = re.compile(rf"<(?P<close>/?){_THINK}\b[^<>]{{0,100}}>", re.IGNORECASE)
_ANSWER_OPEN = re.compile(rf"<{_ANSWER}\b[^<>]{{0,100}}>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(rf"</{_ANSWER}\b[^<>]{{0,100}}>", re.IGNORECASE)
TAG = re.compile(rf"</?(?:{_THINK}|{_ANSWER})\b[^<>]{{0,100}}>", re.IGNORECASE)
"""Any tag that :func:`answer_text` acts on."""

# End-of-text tokens that a server left in; byte order marks and other invisible characters.
_LEFTOVERS = re.compile(r"<\|\w{1,30}\|>|[\ufeff\u200b\u2060]")
_FENCE = re.compile(r"^[^\S\n]*(?:```|~~~)[^\S\n]*[\w-]*[^\S\n]*$", re.MULTILINE)

_REFUSAL = re.compile(
    r"""^\W*(?:
        (?:i['’]m|i\ am)\ (?:\w+\ )?(?:sorry|unable|not\ able)
      | my\ apologies\b | i\ apologi[sz]e\b | sorry(?:\s*[,.!:]|\ but\b|\ i\b)
      | i\ (?:can(?:no|['’])t|cannot|won['’]t)\b(?!\ help\ but)
      | as\ an\ ai\b | as\ a\ (?:large\ )?language\ model\b
      | unfortunately,?\ i\b
      | 抱歉|对不起|很遗憾|我无法|我不能
    )""",
    re.IGNORECASE | re.VERBOSE,
)

_RULE = re.compile(r"(?:^|\n)[^\S\n]*(?:-{3,}|\*{3,}|_{3,}|={3,})\Z")
_COURTESY = re.compile(
    r"\n\n[^\w\n]*(?:(?:please\s+)?let\s+me\s+know|(?:please\s+)?feel\s+free|i\s+hope\s+this"
    r"|hope\s+this|if\s+you\s+(?:need|want|would|have)|would\s+you\s+like"
    r"|is\s+there\s+anything)\b[^\n]*\Z",
    re.IGNORECASE,
)


def answer_text(text: str) -> str:
    """The part of an answer that is meant: no reasoning, no tags, no code fence around it.

    Closed reasoning is dropped. Reasoning that never closes ends what counts, unless an
    ``<answer>`` follows it. Of several ``<answer>`` parts the last that holds something counts.

    Raises:
        BlueprintError: the answer is empty, or is nothing but reasoning that never closes.
    """
    spoken, unclosed = _without_reasoning(unify(text))
    parts = [_ANSWER_CLOSE.split(part)[0] for part in _answers(spoken) or _answers(unclosed or "")]
    text = next((part for part in reversed(parts) if part.strip()), "" if parts else spoken)
    text = _ANSWER_CLOSE.split(text)[0]
    if unclosed is not None and not text.strip():
        raise BlueprintError("the answer ends within its reasoning (<think> is never closed)")
    text = text.strip()
    if text.startswith("```"):
        text = _unfence(text)
    if not text:
        raise BlueprintError("the answer is empty")
    return text


def _without_reasoning(text: str) -> tuple[str, str | None]:
    """What is outside of reasoning, and what follows a tag that opens it and is never closed."""
    spoken: list[str] = []
    opened = False
    start = 0
    for tag in _THINK_TAG.finditer(text):
        if tag["close"]:
            if not opened:  # the tag that opened it was part of the prompt
                spoken.clear()
            opened, start = False, tag.end()
        elif not opened:
            spoken.append(text[start : tag.start()])
            opened, start = True, tag.end()
    rest = text[start:]
    return ("".join(spoken), rest) if opened else ("".join([*spoken, rest]), None)


def _answers(text: str) -> list[str]:
    """What follows each ``<answer>``, up to the next one."""
    return _ANSWER_OPEN.split(text)[1:]


def _unfence(text: str) -> str:
    """What stands between the fence that ``text`` begins with and the last one after it."""
    text = text.partition("\n")[2].removesuffix("```")
    closed = list(_FENCE.finditer(text))
    return text[: closed[-1].start() if closed else None].rstrip()


def unify(text: str) -> str:
    """``text`` with one kind of line end, and without special tokens and invisible marks."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    while _LEFTOVERS.search(text):  # what is left may join up to another one
        text = _LEFTOVERS.sub("", text)
    return text


def fenced(text: str, end: int, last: int) -> tuple[int, int]:
    """The span of ``text`` inside the code fence that opens before ``end``, or all of it.

    Args:
        text: an answer.
        end: where its content begins; the fence opens before.
        last: where its last part begins; the fence closes after.
    """
    opened = list(_FENCE.finditer(text, 0, end))
    if not opened:
        return 0, len(text)
    closed = [fence.start() for fence in _FENCE.finditer(text, last)]
    return opened[-1].end(), closed[0] if closed else len(text)


def strip_ending(text: str, *, courtesy: bool) -> str:
    """``text`` without what closes it and says nothing: horizontal rules, and kind offers of help.

    Args:
        text: a section, or all that a model wrote.
        courtesy: drop a last paragraph such as "Let me know …" too.
    """
    while True:
        shorter = _RULE.sub("", text).strip()
        if courtesy:
            shorter = _COURTESY.sub("", shorter).strip()
        if shorter == text:
            return text
        text = shorter


def json_object(text: str) -> dict[str, Any] | None:
    """The JSON object that ``text`` is, alone or in a code fence; ``None`` where it is not JSON.

    Raises:
        BlueprintError: it begins as a JSON object and cannot be read as one.
    """
    fence = _FENCE.search(text)
    start = text[fence.end() :] if fence else text
    for candidate in (text, start):
        if candidate.lstrip().startswith("{"):
            return _decode(candidate.lstrip())
    return None


def _decode(text: str) -> dict[str, Any]:
    try:
        # Not strict: models write line ends into strings as they are.
        value, _ = json.JSONDecoder(strict=False).raw_decode(text)
    except (ValueError, RecursionError):
        raise BlueprintError("the answer is JSON that is cut off or malformed") from None
    return dict(value)


def as_text(value: Any) -> str:
    """A value of a JSON answer as text: a list becomes bullets, an object named bullets."""
    if value is None:
        return ""
    if isinstance(value, dict):
        return "\n".join(f"- {name}: {as_text(item)}" for name, item in value.items())
    if isinstance(value, list):
        return "\n".join(f"- {as_text(item)}" for item in value)
    return str(value)


def is_refusal(text: str) -> bool:
    """Whether ``text`` opens as a model does that declines the work."""
    return _REFUSAL.match(text) is not None
