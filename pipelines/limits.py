"""The limits: which measure is held against which setting, and the code of what misses it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Limit:
    """A threshold: which measure it limits, its setting, and the code of what misses it."""

    measure: str
    setting: str
    reason: str

    @property
    def is_floor(self) -> bool:
        """Whether values below the threshold are rejected, and not those above."""
        return self.setting.startswith("min_")

    def missed(self, value: float, threshold: float) -> bool:
        """Whether ``value`` is on the wrong side; a value that is no number always is."""
        return not (value >= threshold if self.is_floor else value <= threshold)


LIMITS = (
    Limit("pixels", "max_pixels", "image.too_large"),
    Limit("side", "min_side", "image.too_small"),
    Limit("aspect", "max_aspect", "image.aspect"),
    Limit("entropy", "min_entropy", "image.blank"),
    Limit("sharpness", "min_sharpness", "image.blurred"),
    Limit("text_area", "max_text_area", "image.text"),
    Limit("nsfw", "max_nsfw", "image.unsafe"),
    Limit("aesthetic", "min_aesthetic", "image.unaesthetic"),
    Limit("aspect_change", "max_aspect_change", "pair.size_mismatch"),
    Limit("changed", "min_changed", "pair.unchanged"),
    Limit("changed", "max_changed", "pair.changed_too_much"),
    Limit("shift", "max_shift", "pair.shifted"),
    Limit("ssim", "min_ssim", "pair.ssim_low"),
    Limit("dino", "min_dino", "pair.dino_low"),
    Limit("clip", "min_clip", "pair.clip_low"),
)


def limits_of(measure: str) -> Iterator[Limit]:
    """The limits on a measure."""
    return (limit for limit in LIMITS if limit.measure == measure)
