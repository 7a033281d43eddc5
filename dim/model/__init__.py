"""The model: frozen Qwen2.5-VL, connector, SANA painter, frozen DC-AE, and how they are used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dim.model.config import ModelConfig

if TYPE_CHECKING:
    from dim.model.dim import DIM, EditResult, build, load

__all__ = ["DIM", "EditResult", "ModelConfig", "build", "load"]


def __getattr__(name: str) -> Any:
    """Import torch and the model libraries, seconds of work, for those only who ask for a model."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("dim.model.dim"), name)
