"""One program of a workflow, and what it answers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from dim.config import StrictModel, what_decides
from dim.errors import StorageError
from infra import storage


class Tell(Protocol):
    """Takes how far a step is."""

    def __call__(self, share: float | None, said: str, usd: float = 0.0, /) -> None:
        """``share`` of it is done (0 to 1, where that is known); ``said`` is what it does now, and
        ``usd`` what it has paid to others so far, in dollars."""


@dataclass(frozen=True)
class Done:
    """What a step has made.

    Attributes:
        said: one line about it.
        result: what others may want to know of it, in JSON's types.
        usd: what was paid for it to others.
    """

    said: str
    result: dict[str, Any] = field(default_factory=dict)
    usd: float = 0.0


@dataclass(frozen=True)
class Program:
    """What a step runs.

    Attributes:
        config: its settings.
        folder: below the workflow's own, where its steps have theirs.
        run: makes the output in the step's own folder; ``anew``: it replaces what is there.
        digest: of a finished output, given settings and result; ``None`` where there is none.
        parts: what ``${step.PART}`` adds to a step's folder.
        how: settings that do not decide what comes out, besides those that are marked so.
        clear: removes what is there before a step is made anew whose ``run`` does not replace it.
        stays: it goes on when the workflow has ended, so it has no part in the workflow's Ray.
    """

    config: type[StrictModel]
    folder: str
    run: Callable[[Any, str, bool, Tell], Done]
    digest: Callable[[Any, Mapping[str, Any]], str | None]
    parts: Mapping[str, str] = field(default_factory=dict)
    how: frozenset[str] = frozenset()
    clear: Callable[[Any, Mapping[str, Any]], None] | None = None
    stays: bool = False

    def deciding(self, config: StrictModel, out: str) -> dict[str, Any]:
        """The settings that decide what comes out, without where in the workflow things lie.

        Args:
            config: of this program.
            out: the workflow's own folder.
        """
        values = what_decides(self.config, config.model_dump(mode="json"))
        kept = {key: value for key, value in values.items() if key not in self.how}
        return {key: _moved(value, out) for key, value in kept.items() if key != "out"}


def hash_of(out: str, name: str) -> str | None:
    """Of the file ``name`` in the folder ``out``; ``None`` where it cannot be read."""
    store = storage.open_store(out)
    try:
        return hashlib.sha256(store.read(name)).hexdigest() if store.is_file(name) else None
    except StorageError:
        return None


def _moved(value: Any, out: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, out) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, out) for each in value]
    within = isinstance(value, str) and value.startswith(f"{out}/")
    return f"${{out}}{value.removeprefix(out)}" if within else value
