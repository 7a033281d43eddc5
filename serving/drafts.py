"""A blueprint while it is being written: as much of its clean text as is settled already."""

from __future__ import annotations

from dim import headings
from dim.blueprint import Blueprint
from dim.errors import BlueprintError, DesignerError

NUMBERED = [f"{number}. {title}:" for number, title in enumerate(headings.TITLES, 1)]
_TO_COME = "That is still to be written."
_UNSETTLED = ("{", "[", "`", "<")  # JSON, a fence, reasoning: read as a whole or not at all


class Draft:
    """What has been told of one blueprint; all pieces together are the rendered blueprint.

    A model's own words are cleaned before they are a blueprint, and whether they are one is known
    at their end. So a piece is told when the words up to there, cleaned as if the rest would
    follow, have whole words to add.

    Args:
        instruction: what was asked for.
    """

    def __init__(self, instruction: str) -> None:
        self._instruction = instruction
        self._told = self._seen = ""

    def more(self, words: str) -> str:
        """What may be told next, of an answer that begins with ``words``; often nothing."""
        if words == self._seen:
            return ""
        self._seen = words
        settled = settled_part(words, self._instruction)
        if not settled.startswith(self._told):
            return ""
        piece, self._told = settled[len(self._told) :], settled
        return piece

    def rest(self, rendered: str) -> str:
        """What is left to tell of the whole.

        Raises:
            DesignerError: it does not begin with what was told.
        """
        if not rendered.startswith(self._told):
            raise DesignerError("the designer's answer did not end as it had begun")
        return rendered[len(self._told) :]


def settled_part(words: str, instruction: str) -> str:
    """The rendered blueprint of an answer that begins with ``words``, up to its last whole word."""
    line = words.rfind("\n") + 1
    if ":" not in words[line:]:  # it may become a heading
        words = words[:line]
    begun = headings.count(words)
    if words.lstrip().startswith(_UNSETTLED) or not begun:
        return ""
    # Of those that have begun the first may be left out: the instruction stands in for it.
    for first_missing in (begun + 2, begun + 1):
        missing = NUMBERED[first_missing - 1 :]
        supposed = words + "".join(f"\n{heading} {_TO_COME}" for heading in missing)
        try:
            whole = Blueprint.parse(supposed, instruction=instruction).render()
        except BlueprintError:
            continue
        end = whole.rfind(missing[0]) if missing else len(whole)
        written = whole[:end].rstrip()
        return written[: max(written.rfind(" "), written.rfind("\n")) + 1].rstrip()
    return ""
