"""The shipped tiny models: how they are made, and where they lie.

A real user downloads Qwen2.5-VL, DC-AE and SANA, which somebody pretrained. The tiny models are
the same in miniature: the same classes, pretrained on the tabletop world by ``dim tiny build``.
"""

from __future__ import annotations
