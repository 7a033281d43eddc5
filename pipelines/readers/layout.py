"""Layouts: which columns of somebody's data set hold what a record needs."""

from __future__ import annotations

from pathlib import Path

from dim.config import StrictModel, load_config
from dim.errors import ConfigError

FOLDER = Path(__file__).parent / "layouts"


class Layout(StrictModel):
    """A map of columns. Where there are several names, the first that a record has is taken."""

    image: tuple[str, ...]
    """The image; of a pair, its source."""
    target: tuple[str, ...] = ()
    """The edited image of a pair. A layout without it is one of single images."""
    instruction: tuple[str, ...] = ()
    """What was asked for, of a pair."""
    caption: tuple[str, ...] = ()
    """A text that comes with a single image; it may be missing."""
    id: tuple[str, ...] = ("id",)
    """The columns that together name a record, joined by ``-``."""

    @property
    def required(self) -> tuple[tuple[str, ...], ...]:
        """One of each of these must be there."""
        return tuple(names for names in (self.image, self.target, self.instruction) if names)

    @property
    def columns(self) -> frozenset[str]:
        """Every column that is read."""
        return frozenset((*self.image, *self.target, *self.instruction, *self.caption, *self.id))


def load_layout(name: str, *, pairs: bool) -> Layout:
    """A layout by name, or from a YAML file of one's own.

    Args:
        name: one of :func:`names`, or a path that ends in ``.yaml``.
        pairs: whether edit pairs are wanted, or single images.

    Raises:
        ConfigError: there is no such layout, or it is one of the other kind.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if path.parent == FOLDER and name not in names():
        raise ConfigError(
            f"there is no layout {name!r}; there are {', '.join(names())}, or give a .yaml file"
        )
    layout = load_config(Layout, path)
    if pairs and not (layout.target and layout.instruction):
        raise ConfigError(f"the layout {name} names no target and instruction: not one of pairs")
    if not pairs and layout.target:
        raise ConfigError(f"the layout {name} is one of pairs: give it with --pairs")
    return layout


def names() -> list[str]:
    """The layouts that come along."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))
