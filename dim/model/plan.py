"""What an edit is painted from: the blueprint that was given, else a designer's, else the words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from torch import nn

from dim.blueprint import Blueprint
from dim.design import DesignRequest, Designs, Reply
from dim.errors import BlueprintError, DesignerError, InputError
from dim.images import encode_png
from dim.model.request import Row

SELF: Literal["self"] = "self"


def require_designer(designer: object) -> None:
    """Refuse what neither designs nor is ``"self"`` nor None.

    Raises:
        InputError: says what to pass instead.
    """
    if designer is None or designer == SELF:
        return
    if isinstance(designer, str):
        given = repr(designer)
    elif isinstance(designer, type):
        given = f"the class {designer.__name__}"
    elif isinstance(designer, nn.Module):
        kind = type(designer).__name__
        given = f"a {kind}, of which dim.designers.self_play.SelfDesigner makes one"
    elif callable(getattr(designer, "design", None)):
        return
    else:
        given = f"a {type(designer).__name__}"
    raise InputError(
        "designer must be 'self', None or a designer, such as dim.designers.create('oracle') "
        f"gives, not {given}"
    )


def blueprints(
    rows: Sequence[Row], answers: Callable[[list[int]], Sequence[Reply]]
) -> list[str | None]:
    """Each row's own blueprint, else what ``answers`` gives for its place, tidied.

    Raises:
        DesignerError: an answer is an error, or no blueprint.
    """
    found = [row.blueprint for row in rows]
    wanting = [place for place, blueprint in enumerate(found) if blueprint is None]
    if wanting:
        for place, answer in zip(wanting, answers(wanting), strict=True):
            found[place] = blueprint_of(answer, rows[place].text)
    return found


def ask(designer: Designs, rows: Sequence[Row]) -> Sequence[Reply]:
    """What ``designer`` answers, one text or error a row.

    Raises:
        DesignerError: there are not as many answers.
    """
    requests = [DesignRequest(row.text, encode_png(row.image)) for row in rows if row.image]
    answers = designer.design(requests)
    if len(answers) != len(requests):
        raise DesignerError(f"the designer answered {len(answers)} of {len(requests)} requests")
    return answers


def blueprint_of(answer: Reply, instruction: str) -> str:
    """A designer's answer as a tidy blueprint.

    Raises:
        DesignerError: it is an error, or no blueprint.
    """
    if not isinstance(answer, str):
        raise answer
    try:
        return Blueprint.parse(answer, instruction=instruction).render()
    except BlueprintError as error:
        raise DesignerError(
            f"the designer's answer to {instruction!r} is no blueprint: {error}"
        ) from None
