"""Draw-In-Mind: a designer writes the edit down, a painter paints it."""

from __future__ import annotations

__version__ = "0.1.0"
