"""What a language model meant to answer, taken out of what it wrote around it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from dim.errors import BlueprintError
from dim.loose_json import decode

_THINK = r"(?:think|thinking|thought|reasoning|reflection)"
_ANSWER = r"(?:answer|final_answer|output|response)"
_THINK_TAG = re.compile(
    rf"[<◁](?P<close>/?){_THINK}\b[^<>◁▷]{{0,100}}[>▷]|(?-i:\[(?P<close_too>/?)THINK\])",
    re.IGNORECASE,
)
_ANSWER_OPEN = re.compile(rf"<{_ANSWER}\b[^<>]{{0,100}}>", re.IGNORECASE)
_ANSWER_CLOSE = re.compile(rf"</{_ANSWER}\b[^<>]{{0,100}}>", re.IGNORECASE)
REASONING_FIELDS = ("reasoning_content", "reasoning")
"""What the reasoning of a chat completion is called beside its ``content``."""
_ASIDE = REASONING_FIELDS[0]
_ASIDE_ONLY = re.compile(rf"\s*<{_ASIDE}>(?P<text>.*)</{_ASIDE}>\s*", re.DOTALL)
TAG = re.compile(
    rf"</?(?:{_THINK}|{_ANSWER}|{_ASIDE})\b[^<>]{{0,100}}>|◁/?{_THINK}\b[^<>◁▷]{{0,100}}▷"
    r"|(?-i:\[/?THINK\])",
    re.IGNORECASE,
)
"""Any tag that :func:`answer_text` acts on."""

# Where a model that writes to channels begins to answer.
_FINAL_CHANNEL = re.compile(
    r"<\|channel\|>\s*final\b[^<]{0,60}(?:<\|\w{1,30}\|>[^<]{0,60})??<\|message\|>"
)
# End-of-text tokens that a server left in; byte order marks and other invisible characters.
_LEFTOVERS = re.compile(
    r"<[|｜][\w▁]{1,30}[|｜]>|</s>|<(?:eos|bos|end_of_turn)>|[\ufeff\u200b\u2060]"
)
_ELEMENT = re.compile(
    r"<(?P<tag>\w[\w:-]{0,40})(?:\s[^<>]{0,100})?>(?P<text>.*)</(?P=tag)>", re.DOTALL
)
_MOST_LAYERS = 8  # of quotes and elements around an answer
_FENCE_MARK = r"(?:`{3,}|~{3,})"
_FENCE = re.compile(rf"^[^\S\n]*{_FENCE_MARK}[^\S\n]*[\w+.-]*[^\S\n]*$", re.MULTILINE)
_FENCE_OPENS = re.compile(rf"{_FENCE_MARK}(?:[^\S\n]*[\w+.-]*[^\S\n]*(?:\n|(?=[{{\[])))?")
_FENCE_CLOSES = re.compile(rf"{_FENCE_MARK}\Z")

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
    """The part of an answer that is meant: no reasoning, tag, code fence or quotes around it.

    Closed reasoning is dropped. Reasoning that never closes ends what counts, unless an
    ``<answer>`` follows it. Of several ``<answer>`` parts the last that holds something counts.

    Raises:
        BlueprintError: the answer is empty, or is nothing but reasoning that never closes.
    """
    if aside := _ASIDE_ONLY.fullmatch(text):
        text = aside["text"]
    for _ in range(_MOST_LAYERS):
        body = _spoken(text)
        inner = _unquote(body) or _unwrap(body)
        if inner is None:
            break
        text = inner
    return body


def _spoken(text: str) -> str:
    spoken, unclosed = _without_reasoning(unify(_after_channels(text)))
    parts = [_ANSWER_CLOSE.split(part)[0] for part in _answers(spoken) or _answers(unclosed or "")]
    text = next((part for part in reversed(parts) if part.strip()), "" if parts else spoken)
    text = _ANSWER_CLOSE.split(text)[0]
    if unclosed is not None and not text.strip():
        raise BlueprintError("the answer ends within its reasoning (<think> is never closed)")
    text = text.strip()
    if text.startswith(("```", "~~~")):
        text = _unfence(text)
    if not text:
        raise BlueprintError("the answer is empty")
    return text


def says_something(text: str) -> bool:
    """Whether ``text`` has more than white space, tags and special tokens."""
    return bool(TAG.sub("", unify(text)).strip())


def as_reasoning(text: str) -> str:
    """An answer that a server put where a model's reasoning belongs, marked as such.

    A text there may be thoughts about an answer, so the mark goes where the text goes. The answer
    is read if it is nothing else.
    """
    return f"<{_ASIDE}>{text}</{_ASIDE}>"


@contextmanager
def telling_reasoning(text: str) -> Iterator[None]:
    """Have errors about an answer say that it lies where reasoning belongs, if it does."""
    try:
        yield
    except BlueprintError as error:
        if not is_reasoning(text):
            raise
        raise BlueprintError(f"the answer lies in the model's reasoning alone: {error}") from None


def is_reasoning(text: str) -> bool:
    """Whether an answer has the mark of :func:`as_reasoning`."""
    return _ASIDE_ONLY.fullmatch(text) is not None


def _after_channels(text: str) -> str:
    """What a model wrote to its last channel ``final``, if it writes to channels."""
    if "<|channel|>" not in text:
        return text
    final = list(_FINAL_CHANNEL.finditer(text))
    if not final:
        raise BlueprintError("the answer ends within its reasoning (no channel 'final')")
    return text[final[-1].end() :]


def _unquote(text: str) -> str | None:
    """What a text says that is one string of JSON as a whole."""
    if not text.startswith('"'):
        return None
    try:
        value, end = decode(text)
    except ValueError:
        return None
    return value if isinstance(value, str) and end == len(text) else None


def _unwrap(text: str) -> str | None:
    """What is within the one element that ``text`` is."""
    element = _ELEMENT.fullmatch(text)
    if element is None or f"</{element['tag']}>" in element["text"]:
        return None
    return element["text"]


def _without_reasoning(text: str) -> tuple[str, str | None]:
    """What is outside of reasoning, and what follows a tag that opens it and is never closed."""
    spoken: list[str] = []
    opened = False
    start = 0
    for tag in _THINK_TAG.finditer(text):
        if tag["close"] or tag["close_too"]:
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
    text = _FENCE_CLOSES.sub("", _FENCE_OPENS.sub("", text, count=1))
    closed = list(_FENCE.finditer(text))
    return text[: closed[-1].start() if closed else None].strip()


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


def is_refusal(text: str) -> bool:
    """Whether ``text`` opens as a model does that declines the work."""
    return _REFUSAL.match(text) is not None
