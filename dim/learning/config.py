"""The part of a stage's file that decides what it learns from, and so the features of its data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from dim.config import StrictModel
from dim.records import TextName

StageName = Literal["t2i", "edit1", "edit2"]

_DEFAULT_TEXT: dict[StageName, TextName] = {
    "t2i": "caption",
    "edit1": "instruction",
    "edit2": "blueprint",
}


class StageInputs(StrictModel):
    """A stage's model, data and texts.

    ``init`` is a DIM folder (of an earlier stage or a download) or a model YAML to build from.
    ``data`` are output folders of data jobs: of images and texts, or of their features as
    ``dim data features`` makes them.

    ``buckets``: each sample is cut to the nearest of SANA's shapes (``dim.model.sizes``), and a
    batch holds one shape; otherwise every sample is a square of the model's resolution.
    """

    stage: StageName
    init: str
    data: list[str] = Field(min_length=1)

    text: TextName | None = None  # None = caption for t2i, instruction for edit1, else blueprint
    text_mix: dict[TextName, PositiveFloat] | None = None  # instead: shares, drawn at each use
    precision: Literal["fp32", "bf16"] = "fp32"
    buckets: bool = False

    @model_validator(mode="after")
    def _check_texts(self) -> StageInputs:
        wrong = [text for text in self.texts if (text == "caption") != (self.stage == "t2i")]
        if wrong:
            raise ValueError(f"stage {self.stage} cannot train on the text {wrong[0]!r}")
        return self

    @property
    def edits(self) -> bool:
        """Whether a source image is part of every sample."""
        return self.stage != "t2i"

    @property
    def texts(self) -> tuple[TextName, ...]:
        """Every text a sample may be trained on, in a fixed order."""
        if self.text_mix:
            return tuple(sorted(self.text_mix))
        return (self.text or _DEFAULT_TEXT[self.stage],)

    @property
    def text_shares(self) -> tuple[float, ...]:
        """The probability of each of ``texts``."""
        if not self.text_mix:
            return (1.0,)
        total = sum(self.text_mix.values())
        return tuple(self.text_mix[text] / total for text in self.texts)

    @property
    def columns(self) -> list[str]:
        """The columns that the stage reads of its data."""
        images = ["image", "image_target"] if self.edits else ["image"]
        return ["id", *images, *self.texts]
