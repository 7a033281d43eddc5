"""Is a text a blueprint, and if not, which of its sections is wrong?"""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from dim import headings
from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from serving.protocol import CheckRequest, CheckResponse

SECTIONS: tuple[Any, ...] = tuple(field.name for field in fields(Blueprint))


def check(wanted: CheckRequest) -> CheckResponse:
    """Whether the text reads as a blueprint, and how it is painted from."""
    try:
        blueprint = Blueprint.parse(wanted.blueprint, instruction=wanted.prompt)
    except BlueprintError as error:
        return CheckResponse(
            valid=False, section=section_of(str(error)), message=str(error), blueprint=None
        )
    return CheckResponse(
        valid=True, section=None, message="this is a blueprint", blueprint=blueprint.render()
    )


def section_of(message: str) -> Any:
    """The section that an error of ``dim.blueprint`` is about; ``None``: of no single one."""
    return next(
        (
            name
            for number, name in enumerate(SECTIONS, 1)
            if message.startswith(headings.name(number))
        ),
        None,
    )


def sections(blueprint: Blueprint) -> dict[Any, str]:
    """Its five sections by their names."""
    return asdict(blueprint)
