"""The model: frozen Qwen2.5-VL, connector, SANA painter, frozen DC-AE, and how they are used."""

from __future__ import annotations

from dim.model.config import ModelConfig
from dim.model.dim import DIM, EditResult, build, load

__all__ = ["DIM", "EditResult", "ModelConfig", "build", "load"]
