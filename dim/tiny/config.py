"""Configuration of ``dim tiny build``: what each part is trained on, and for how long."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt, field_validator

from dim.config import StrictModel
from dim.tabletop import KINDS

Form = Literal["words", "look", "caption", "prompt", "design"]


class PartConfig(StrictModel):
    """One part's training: AdamW, warm-up, then a cosine down to a hundredth of the rate."""

    steps: PositiveInt  # updates of the weights
    batch_size: PositiveInt  # images or texts a step
    learning_rate: float = Field(gt=0)  # after warm-up
    warmup_steps: int = Field(default=200, ge=0)  # over which it rises from nothing
    weight_decay: float = Field(default=0.01, ge=0)  # AdamW's
    grad_clip: float = Field(default=1.0, gt=0)  # largest norm of all gradients together


class AutoencoderPartConfig(PartConfig):
    """The DC-AE.

    ``thing_weight``: how much more a pixel on or beside a thing counts than bare table;
    ``latent_noise``: the largest standard deviation of the noise that the decoder must see
    through (latents have about unit scale); ``latent_scale_weight``: weight of the pull of every
    latent channel towards mean 0 and deviation 1.
    """

    thing_weight: float = Field(default=8.0, ge=1)
    latent_noise: float = Field(default=0.15, ge=0)
    latent_scale_weight: float = Field(default=0.02, ge=0)


class UnderstandingPartConfig(PartConfig):
    """The Qwen2.5-VL. A share says how often a form of text is drawn, early and late in training.

    The forms: ``words`` (a scene in words and an instruction, answered by the blueprint), ``look``
    (an image, answered by what lies at each place), ``caption`` (an image, described), ``design``
    (image and instruction, answered by the blueprint), ``prompt`` (a painter's condition).
    ``grounding_weight``, ``binding_weight``: of the losses of :mod:`dim.tiny.auxiliary`
    against the words.
    """

    tokenizer_texts: PositiveInt = 4000  # from which its words are learnt
    grounding_weight: float = Field(default=1.0, ge=0)
    binding_weight: float = Field(default=0.0, ge=0)
    early_until: float = Field(default=0.15, ge=0, le=1)  # share of the steps
    early: dict[Form, float]  # shares of the forms until then
    late: dict[Form, float]  # and from then on

    @field_validator("early", "late")
    @classmethod
    def _sums_to_one(cls, shares: dict[Form, float]) -> dict[Form, float]:
        if min(shares.values(), default=0) < 0 or abs(sum(shares.values()) - 1) > 1e-6:
            raise ValueError("shares must not be negative and must sum to 1")
        return shares


class PainterPartConfig(StrictModel):
    """The painter and its connector, on text-to-image alone; edits are the demo's to learn.

    They are trained by a stage, whose file in configs/ has everything but its data and model.
    """

    scenes: PositiveInt  # that are painted from their captions
    stage: str  # the file of its stage
    stage_overrides: tuple[str, ...] = ()
    """key=value settings on top of it."""
    work: Path = Path("runs/tiny-build")
    """Folder of data, checkpoints and the run's record."""


class TinyBuildConfig(StrictModel):
    """Everything ``dim tiny build`` needs besides the architectures of the model file."""

    seed: int = 0  # of all that is drawn
    resolution: PositiveInt = 64  # side of an image in pixels
    objects: tuple[int, int] = (2, 4)  # fewest and most things on a table
    kinds: tuple[str, ...] = KINDS  # of edits that blueprints are about
    referential: float = Field(default=0.3, ge=0, le=1)  # share of indirect instructions
    autoencoder: AutoencoderPartConfig
    understanding: UnderstandingPartConfig
    binding: UnderstandingPartConfig  # the understanding model, trained further
    painter: PainterPartConfig
    evaluate: PositiveInt = 200  # held-out scenes that each part is measured on
