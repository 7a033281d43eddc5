"""Where the five sections of a blueprint begin, in the many ways that designers mark them.

Several readings are tried, strictest first, and a reading counts only if it finds all five
sections, once each, in order. So a form that is read leniently never lets an incomplete blueprint
through.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import pairwise

from dim.errors import BlueprintError
from dim.reading import fenced, strip_ending

TITLES = (
    "Edit Instruction",
    "Global Layout Perception",
    "Local Object Perception",
    "Edit Area Localization",
    "Edited Image Imagination",
)
"""Headings of sections 1 to 5, in the order of the fields of :class:`dim.blueprint.Blueprint`."""

_GAP = r"(?:[^\S\n]|[_-])+"
_FORMS = (
    "edit(?:ing|ed)? instructions?|编辑指令",
    "global layouts? perceptions?|全局布局感知",
    "local objects? perceptions?|局部(?:对象|物体|目标)感知",
    "edit(?:ing|ed)? areas? locali[sz]ations?|编辑区域定位",
    "edit(?:ing|ed)? images? imaginations?|编辑后?(?:的)?图[像片]想象",
)
_TITLE = "|".join(
    f"(?P<section{number}>{forms.replace(' ', _GAP)})" for number, forms in enumerate(_FORMS, 1)
)
KEYS = "|".join(_FORMS).replace(" ", r"[\s_-]*")
"""A regular expression for the titles as the keys of an object, which may run together."""
_NUMBER = r"[1-9]|iv|v|i{1,3}|[①-⑤]|[一二三四五]"
_NUMBERS = {
    form: number
    for number, forms in enumerate(
        ("1 i ① 一", "2 ii ② 二", "3 iii ③ 三", "4 iv ④ 四", "5 v ⑤ 五"), 1
    )
    for form in forms.split()
}
_NUMBERED = rf"""
    (?:(?:step|section|part)[^\S\n]{{0,8}}|第)?[(（\[]?
    (?P<number>{_NUMBER})\ufe0f?\u20e3?
    (?P<shut>[*_]{{0,3}})[^\S\n]{{0,8}}(?:\\?[.):．）、：\]]|步|[-–—](?=\s)|(?=\s)|(?<=[①-⑤\u20e3]))
    (?P<shut_late>[*_]{{0,3}})[^\S\n]{{0,8}}
"""
_TITLED = rf"""
    (?P<inner>[*_]{{0,3}})
    [\[【"“‘'`<]?(?P<title>{_TITLE})[\]】"”’'`>]?
    (?P<close>[*_]{{0,3}})
    (?:[^\S\n]{{0,8}}[(（][^()（）\n]{{1,60}}[)）](?P<close_late>[*_]{{0,3}})(?=[^\S\n]{{0,8}}[*_]*[:：\n]))?
    [^\S\n]{{0,8}}
"""
_END = r"(?P<end>[:：]|[-–—](?=\s)|(?=\s|\Z))"
_FLAGS = re.IGNORECASE | re.MULTILINE | re.VERBOSE
_HEADING = re.compile(
    rf"""
    ^(?P<lead>(?:[^\S\n]|[>\#•·▪◆●○■□▶►→+]|[-–—](?=\s)|\*[^\S\n]
        |[\U0001F300-\U0001FAFF\u2600-\u26ff\u2700-\u27bf\ufe0f])*)
    (?P<open>[*_]{{0,3}})[\[【<`]?
    (?:{_NUMBERED})?{_TITLED}{_END}
    """,
    _FLAGS,
)
_INLINE = re.compile(
    rf"(?<![\w.>])(?P<open>[*_]{{0,3}})(?P<lead>){_NUMBERED}{_TITLED}(?P<end>[:：])", _FLAGS
)
_MISSPELT = re.compile(
    r"^[^\w\n]{0,20}(?:step|section)?[ \t]*(?P<number>[1-5])[^\w\n]{1,9}"
    r"(?P<title>[A-Za-z][\w \t-]{5,40}?)(?P<close>[*_]{0,3})[ \t]*[:：](?P<close_late>[*_]{0,3})",
    re.IGNORECASE | re.MULTILINE,
)
_ALIKE = 0.8  # of a misspelt title, as difflib counts; two of the real titles reach 0.77
_FINAL = re.compile(
    r"^[^\w\n]*(?:here[^\w\n]+is\s+)?(?:the\s+|my\s+)?(?:final|revised|corrected|improved|updated)\s+"
    r"(?:edit\s+)?(?:version|plan|answer|blueprint|output|response)[^\w\n]*$",
    re.IGNORECASE | re.MULTILINE,
)
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])")
_OWN_ELEMENT = re.compile(
    rf"<(?P<close>/?)[^\S\n]*(?:\d[ ._-]*)?(?P<title>{KEYS})[^\S\n]*>", re.IGNORECASE
)
_OPENING_TAG = re.compile(r"<(\w[\w:-]{0,40})(?:\s[^<>]{0,100})?>")
_BLOCK = re.compile(r"[^\S\n]*[|>][+-]?[^\S\n]*(?=\n)")
_LINE_ELEMENT = re.compile(r"<br\s*/?>|</(?:p|div|li|h[1-6])>", re.IGNORECASE)
_ELEMENT = re.compile(r"</?(?:p|div|span|ul|ol|li|b|strong|i|em|u|h[1-6])\b[^<>]*>", re.IGNORECASE)


@dataclass(frozen=True)
class Heading:
    """A heading found in a text.

    ``start`` and ``end`` are its first character and the first of what follows it; ``marker`` is
    emphasis that it opened and did not close; ``style`` is how it is marked.
    """

    section: int
    number: int | None
    start: int
    end: int
    marker: str
    closed: bool
    colon: bool
    style: tuple[bool, bool, str]


@dataclass(frozen=True)
class Sections:
    """The texts of the sections, without headings, and the designer's own words for all of them.

    ``texts`` has five entries, or four where the first section was missing and may be.
    """

    texts: tuple[str, ...]
    words: str


def split(body: str, *, may_lack_first: bool) -> Sections:
    """Cut an answer at its five headings.

    Args:
        body: the answer's text, of :func:`dim.reading.answer_text`.
        may_lack_first: accept an answer that starts with section 2.

    Raises:
        BlueprintError: names the sections that are missing, doubled or out of order.
    """
    first_error = None
    for version in _versions(_without_own_elements(body)):
        try:
            return _cut(version, _find(version, may_lack_first))
        except BlueprintError as error:
            first_error = first_error or error
    raise first_error or BlueprintError("the answer is empty")


def find_numbered(lines: str) -> int | None:
    """The section whose numbered heading is the first one on a line of ``lines``, if any is."""
    return next((h.section for h in _lines(lines) if h.number is not None), None)


def first_heading(body: str) -> int:
    """Where the first line that looks like a heading begins; the length of ``body`` without one."""
    found = _HEADING.search(body)
    return found.start() if found else len(body)


def section_of(key: str) -> int | None:
    """The section that a key of an object names with its title, however that is written."""
    words = " ".join(re.sub(r"[_./-]+", " ", _CAMEL.sub(" ", key)).split())
    found = _HEADING.match(words)
    if found and not words[found.end() :].strip(" :：*"):
        return _heading(found).section
    run_together = re.fullmatch(rf"[\W\d_]*(?P<title>{KEYS})[\W\d_]*", key, re.IGNORECASE)
    if run_together is None:
        return None
    return next(n for n, form in enumerate(_FORMS, 1) if _matches(form, run_together["title"]))


def count(body: str) -> int:
    """How many of the five sections have a line that looks like their heading."""
    return len({heading.section for heading in _lines(body)})


def without_own(number: int, text: str) -> str:
    """``text`` of a section without the section's own heading in front."""
    found = _HEADING.match(text)
    own = _heading(found) if found else None
    if own is None or own.section != number or not (own.colon or own.number == number):
        return text
    return _text(text, own, len(text)).strip()


def without_block(text: str) -> str:
    """``text`` without the mark by which YAML says that a text of several lines follows."""
    block = _BLOCK.match(text)
    return text[block.end() :] if block else text


def has_own_element(text: str) -> bool:
    """Whether ``text`` has a tag such as ``<edit_instruction>``, which would read as a heading."""
    return _OWN_ELEMENT.search(text) is not None


def name(number: int) -> str:
    """How errors call a section."""
    return f"section {number} ({TITLES[number - 1]})"


def _matches(forms: str, title: str) -> bool:
    return re.fullmatch(forms.replace(" ", r"[\s_-]*"), title, re.IGNORECASE) is not None


def _without_own_elements(body: str) -> str:
    """Sections that are elements named after their titles, as sections with headings."""
    tags = [bool(tag["close"]) for tag in _OWN_ELEMENT.finditer(body)]
    if not any(tags):
        return body
    if tags != [False, True] * (len(tags) // 2):
        raise BlueprintError("an element named after a section does not end")
    return _OWN_ELEMENT.sub(lambda tag: "\n" if tag["close"] else f"\n\n{tag['title']}:\n", body)


def _versions(body: str) -> Iterator[str]:
    """The answer, then what it may have meant: its last version, or its text without HTML."""
    yield body
    final = list(_FINAL.finditer(body))
    if final:
        yield body[final[-1].end() :]
    plain = html.unescape(_ELEMENT.sub("", _LINE_ELEMENT.sub("\n", body)))
    if plain != body:
        yield plain


def _find(body: str, may_lack_first: bool) -> Sequence[Heading]:
    complete = list(range(1, len(TITLES) + 1))
    for wanted in [complete, complete[1:]] if may_lack_first else [complete]:
        for headings in _candidates(body, wanted):
            if [heading.section for heading in headings] == wanted:
                return headings
    found = [heading.section for heading in _lines(body) if _stands_out(body, heading)]
    raise BlueprintError(_what_is_wrong(found, may_lack_first))


def _candidates(body: str, wanted: list[int]) -> Iterator[Sequence[Heading]]:
    """Readings of the headings, strictest first."""
    found = _lines(body)
    numbered = [heading for heading in found if heading.number is not None]
    yield [heading for heading in numbered if heading.number == heading.section and heading.colon]
    yield numbered
    marked = [heading for heading in found if _stands_out(body, heading)]
    yield marked
    # Prose can hold a line that looks like a heading, but hardly ever marked as the headings are.
    styles = dict.fromkeys(heading.style for heading in marked)
    alike = [[heading for heading in marked if heading.style == style] for style in styles]
    whole = [headings for headings in alike if [h.section for h in headings] == wanted]
    if len(whole) == 1:
        yield whole[0]
    inline = [_heading(match) for match in _INLINE.finditer(body)]
    yield [heading for heading in inline if heading.number == heading.section]
    known = {heading.section for heading in marked}
    misspelt = [heading for heading in _misspelt(body) if heading.section not in known]
    yield sorted([*marked, *misspelt], key=lambda heading: heading.start)


def _lines(body: str) -> list[Heading]:
    return [_heading(match) for match in _HEADING.finditer(body)]


def _heading(match: re.Match[str]) -> Heading:
    section = next(n for n in range(1, len(TITLES) + 1) if match[f"section{n}"])
    number = match["number"]
    shut = bool(match["shut"] or match["shut_late"])
    marker = match["inner"] if shut else match["open"] + match["inner"]
    return Heading(
        section,
        _NUMBERS.get(number.lower(), 0) if number else None,
        match.start(),
        match.end(),
        marker.replace("_", "*"),
        bool(match["close"] or match["close_late"]),
        bool(match["end"]),
        (number is not None, "#" in match["lead"], marker),
    )


def _misspelt(body: str) -> Iterator[Heading]:
    """Numbered lines whose title is nearly the one of their number, or its first words."""
    for match in _MISSPELT.finditer(body):
        written = " ".join(match["title"].lower().split())
        alike = [SequenceMatcher(None, written, title.lower()).ratio() for title in TITLES]
        section = int(match["number"])
        shortened = " " in written and TITLES[section - 1].lower().startswith(written.rstrip("s"))
        if shortened or alike[section - 1] == max(alike) >= _ALIKE:
            style = (True, False, "")
            yield Heading(section, section, match.start(), match.end(), "", True, True, style)


def _stands_out(body: str, heading: Heading) -> bool:
    """A heading without number has a colon or is alone on its line; else it is prose."""
    rest = body[heading.end :].partition("\n")[0]
    return heading.number is not None or heading.colon or not rest.strip(" \t*_:")


def _cut(body: str, headings: Sequence[Heading]) -> Sections:
    first, last = headings[0], headings[-1]
    _, stop = fenced(body, first.start, last.end)
    stop = _wrapper_end(body, first.start, last.end, stop)
    body = body[: last.end] + strip_ending(f"x{body[last.end : stop]}", courtesy=True)[1:]
    ends = [heading.start for heading in headings[1:]] + [len(body)]
    texts = (_text(body, heading, end) for heading, end in zip(headings, ends, strict=True))
    return Sections(tuple(texts), body[first.start :].strip())


def _wrapper_end(body: str, start: int, last: int, stop: int) -> int:
    """Where the element ends that opens before ``start``, if one is wrapped around all sections."""
    for tag in reversed(list(_OPENING_TAG.finditer(body, 0, start))):
        closing = f"</{tag[1]}>"
        end = body.rfind(closing, last, stop)
        if end >= 0 and closing not in body[tag.end() : start]:
            stop = end
    return stop


def _text(body: str, heading: Heading, end: int) -> str:
    text = without_block(body[heading.end : end])
    if heading.marker:
        text = _close_emphasis(text, closed=heading.closed, marker=heading.marker)
    if not text.partition("\n")[0].strip():
        text = textwrap.dedent(text.partition("\n")[2])
    return text


def _close_emphasis(text: str, *, closed: bool, marker: str) -> str:
    """Drop the end of a bold heading, which may come after its colon or after the whole section."""
    start = text.lstrip(" \t")
    if closed:
        stray = re.match(r"[*_]{1,3}(?=\s)", start)
        return start[stray.end() :] if stray else text.removeprefix(":")
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
        names = ", ".join(name(number) for number in missing)
        return f"{names} {'is' if len(missing) == 1 else 'are'} missing"
    doubled = [number for number in sorted(set(found)) if found.count(number) > 1]
    if doubled:
        return f"{name(doubled[0])} appears {found.count(doubled[0])} times"
    late = next(b for a, b in pairwise(found) if b < a)
    return f"{name(late)} is out of order (sections found: {', '.join(map(str, found))})"
