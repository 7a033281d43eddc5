"""Judges: what says in numbers how good a painted image is.

This table is all that those who ask for a judgement know of the judges:

- ``tabletop``: whether the scene of a tabletop record is there, see ``dim.tabletop.checker``.
- ``similarity``: how like the target the image is, for images of any kind.
- ``MODULE:FUNCTION``: a judge of one's own, which the function makes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from PIL import Image

from dim.errors import ConfigError
from dim.failures import explain

JUDGES = {
    "tabletop": "dim.judges.tabletop:TabletopJudge",
    "similarity": "dim.judges.similarity:SimilarityJudge",
}


@runtime_checkable
class Judge(Protocol):
    """Scores painted images one by one.

    Attributes:
        columns: What it needs of a record besides the id.
    """

    columns: Sequence[str]

    def judge(
        self,
        painted: Image.Image,
        target: Image.Image,
        source: Image.Image | None,
        row: Mapping[str, Any],
    ) -> Mapping[str, float]:
        """Scores of a sample by name; one that it cannot have is left out.

        Args:
            painted: What the model made, RGB.
            target: What it should have made, RGB of the same size.
            source: What an edit was made of, RGB of the same size; ``None`` of a text-to-image
                sample.
            row: ``id`` and ``columns`` of its record; a value may be ``None``.

        Any exception says that this sample cannot be judged.
        """
        ...


def create(name: str) -> Judge:
    """The judge that ``name`` stands for, see above.

    Raises:
        ConfigError: there is none of that name, or what makes it fails or makes something else.
    """
    check_name(name)
    where, _, function = JUDGES.get(name, name).partition(":")
    try:
        made = getattr(importlib.import_module(where), function)()
    except Exception as error:
        raise ConfigError(f"judge {name}: {explain(error).sentence}") from error
    if not isinstance(made, Judge):
        raise ConfigError(
            f"judge {name} is a {type(made).__name__}, which lacks columns or a method judge"
        )
    return made


def check_name(name: str) -> None:
    """Refuse what can be no judge's name.

    Raises:
        ConfigError: it is neither in the table nor ``MODULE:FUNCTION``.
    """
    module, _, function = name.partition(":")
    if name not in JUDGES and not (module and function):
        raise ConfigError(
            f"there is no judge {name!r}; there are {', '.join(JUDGES)}, or MODULE:FUNCTION"
        )
