"""A judge for images of any kind: how like the target one is, without any model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

SAME = 100.0
"""The highest ``psnr``, which of equal images has no bound."""


class SimilarityJudge:
    """``psnr`` in decibels (at most ``SAME``) and ``ssim`` (-1 to 1; Wang et al. 2004) over RGB."""

    columns: Sequence[str] = ()

    def judge(
        self,
        painted: Image.Image,
        target: Image.Image,
        source: Image.Image | None,
        row: Mapping[str, Any],
    ) -> dict[str, float]:
        """See :class:`dim.judges.Judge`; images have 7 pixels a side at least."""
        one, other = np.asarray(painted), np.asarray(target)
        if np.array_equal(one, other):
            return {"psnr": SAME, "ssim": 1.0}
        return {
            "psnr": min(SAME, float(peak_signal_noise_ratio(other, one, data_range=255))),
            "ssim": float(structural_similarity(other, one, data_range=255, channel_axis=2)),
        }
