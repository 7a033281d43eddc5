"""The part of a stage's file that decides what it learns from, and so the features of its data."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, PositiveFloat, model_validator

from dim.config import StrictModel
from dim.errors import ConfigError
from dim.model.config import ModelConfig, VlmView
from dim.records import TextName

StageName = Literal["t2i", "edit1", "edit2"]

_DEFAULT_TEXT: dict[StageName, TextName] = {
    "t2i": "caption",
    "edit1": "instruction",
    "edit2": "blueprint",
}


def check_view(model: ModelConfig, wanted: VlmView, where: str) -> None:
    """Refuse to train a model on whole sources that was trained on regions of them.

    The other way is how a stage begins that wants it so, for what is published saw whole ones.

    Args:
        model: What ``where`` says of the model that the stage begins with.
        wanted: The stage's.

    Raises:
        ConfigError: the model was trained with ``region`` and the stage is not.
    """
    if wanted == "whole" and model.understanding.vlm_view != wanted:
        raise ConfigError(
            f"{where} was trained with vlm_view: {model.understanding.vlm_view}, and a stage that "
            f"goes on from it with vlm_view: {wanted} (the default) would unlearn it: set vlm_view"
        )


class StageInputs(StrictModel):
    """A stage's model, data and texts.

    ``init`` is a DIM folder (of an earlier stage or a download) or a model YAML to build from.
    ``data`` are output folders of data jobs: of images and texts, or of their features as
    ``dim data features`` makes them.

    ``buckets``: each sample is cut to the nearest of SANA's shapes (``dim.model.sizes``), and a
    batch holds one shape; otherwise every sample is a square of the model's resolution.
    ``vlm_view``: what the understanding model is shown of an edit's source. ``whole``: all of it,
    as published. ``region``: what the painter is given, no more.
    """

    stage: StageName
    init: str
    data: list[str] = Field(min_length=1)

    text: TextName | None = None  # None = caption for t2i, instruction for edit1, else blueprint
    text_mix: dict[TextName, PositiveFloat] | None = None  # instead: shares, drawn at each use
    precision: Literal["fp32", "bf16"] = "fp32"
    buckets: bool = False
    vlm_view: VlmView = "whole"

    @model_validator(mode="after")
    def _check_view(self) -> StageInputs:
        if self.vlm_view != "whole" and not self.edits:
            raise ValueError("stage t2i shows the understanding model no image: leave vlm_view out")
        return self

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
