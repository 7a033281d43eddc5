"""The rules of the filters: every threshold is a setting."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeVar

from pydantic import Field, model_validator

from dim.config import HowOnly, StrictModel
from pipelines.limits import LIMITS


class ImageRules(StrictModel):
    """What a single image must be. A threshold of ``null`` switches its filter off."""

    min_side: int | None = 512
    """Shorter side in pixels, at least."""
    max_pixels: int = 50_000_000
    """Width x height at most; read off the header, before anything is decoded."""
    max_aspect: float | None = 4.0
    """Longer side over shorter side, at most."""
    min_entropy: float | None = 1.5
    """Shannon entropy of the grey levels at 64 px in bits, 0 to 8, at least; below, it is blank."""
    min_sharpness: float | None = 5e-5
    """Variance of the Laplacian of the luma in [0, 1], at ``detail_side``, at least."""
    max_text_area: float | None = 0.15
    """Share of the area that looks like lines of text or a tiled watermark, at most."""
    detail_side: int = Field(512, ge=16)
    """Sharpness and text are measured at this longer side (smaller images at their own size)."""
    nsfw_model: str | None = None
    """Folder of a transformers image classifier that knows the label ``nsfw_label``."""
    nsfw_label: str = "nsfw"
    max_nsfw: float | None = 0.5
    """Probability of that label, at most."""
    aesthetic_model: str | None = None
    """Folder of a transformers CLIP model."""
    aesthetic_head: str | None = None
    """Safetensors file with ``weight`` (1, D) and ``bias`` (1,) over its unit-length embedding."""
    min_aesthetic: float | None = 4.5
    """What that head says, at least."""
    gpus: Annotated[float, HowOnly] = Field(0, ge=0)
    """GPUs of a task that filters: then models run on one, in batches. A share lets several tasks
    read and decode beside one another for the same GPU."""

    @model_validator(mode="after")
    def _check_aesthetic(self) -> Self:
        if (self.aesthetic_model is None) != (self.aesthetic_head is None):
            raise ValueError("aesthetic_model and aesthetic_head belong together")
        return self


class PairThresholds(StrictModel):
    """Thresholds of one source's pairs; what is not set is as for all pairs."""

    max_aspect_change: float | None = None
    max_shift: float | None = None
    min_changed: float | None = None
    max_changed: float | None = None
    min_ssim: float | None = None
    min_dino: float | None = None
    min_clip: float | None = None


class PairRules(ImageRules):
    """What an edit pair must be. A pair is kept when it meets all rules jointly."""

    min_entropy: float | None = 0.5
    """As of single images; lower, for an edit may leave one small thing on white."""
    max_aspect_change: float | None = 0.05
    """Relative difference between the aspect ratios of source and target, at most."""
    change_side: int = Field(256, ge=16)
    """Changed pixels and shifts are measured at this longer side (smaller pairs at their own)."""
    max_shift: float | None = 0.01
    """Distance by which the whole picture has moved, over its longer side, at most."""
    min_changed: float | None = 0.001
    """Share of the pixels that visibly changes, at least; below, nothing was edited."""
    max_changed: float | None = 1.0
    """Share of the pixels that visibly changes, at most; a new style changes them all."""
    ssim_side: int = Field(32, ge=7)
    """Structural similarity is taken at this longer side in pixels. So small, it compares layouts:
    a new style keeps them, where at full size it leaves no more similarity than chance does."""
    min_ssim: float | None = 0.1
    """Structural similarity of the luminance, at least; below, it is another picture. Low, because
    a new background changes most of a layout too; what passes wrongly is left to triage."""
    dino_model: str | None = None
    """Folder of a transformers DINO model."""
    min_dino: float | None = 0.5
    """Cosine of its embeddings of source and target, at least."""
    clip_model: str | None = None
    """Folder of a transformers CLIP model."""
    min_clip: float | None = 0.6
    """Cosine of its image embeddings of source and target, at least."""
    sources: dict[str, PairThresholds] = Field(default_factory=dict)
    """Other thresholds for the pairs of a source, by the name that its records carry."""

    def of(self, source: str) -> PairRules:
        """The rules for the pairs of ``source``."""
        own = self.sources.get(source)
        return self if own is None else self.model_copy(update=own.model_dump(exclude_none=True))


RulesT = TypeVar("RulesT", bound=ImageRules)


def without_thresholds(rules: RulesT) -> RulesT:
    """Rules by which everything stays that can be decoded."""
    off: dict[str, Any] = {limit.setting: None for limit in LIMITS if hasattr(rules, limit.setting)}
    if isinstance(rules, PairRules):
        off["sources"] = {}
    return rules.model_copy(update={**off, "max_pixels": rules.max_pixels})
