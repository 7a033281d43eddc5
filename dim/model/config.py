"""The configuration of a DIM: which weights or which sizes each of its parts has."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, PositiveInt, field_validator, model_validator

from dim.config import StrictModel
from dim.errors import CheckpointError, InputError

INSTRUCTION = "{instruction}"
Fit = Literal["source", "square"]
Solver = Literal["dpm", "euler"]
VlmView = Literal["whole", "region"]
Task = Literal["edit", "t2i"]


class PartConfig(StrictModel):
    """Where a part's weights come from.

    ``weights``: ``package:tiny/NAME``, a folder or file, a hub id, or null for random ones.
    ``dtype``: the floating type they are brought to; null keeps the saved one.
    """

    weights: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] | None = None


class UnderstandingConfig(PartConfig):
    """The frozen Qwen2.5-VL.

    ``architecture``: keyword arguments of ``Qwen2_5_VLConfig``, used with null weights only.
    ``image_size``: pictures are resized to this square before the vision tower sees them.
    ``vlm_view``: what it is shown of an edit's source: ``whole``, all of it, as published, or the
    ``region`` that the painter is given. A stage writes down which of them it trained with.
    ``max_condition_tokens``: of a longer prompt the last so many tokens condition the painter.
    ``design_request``: what the model is asked when it designs; null asks the general request of
    ``dim.blueprint``.
    """

    architecture: dict[str, Any] = Field(default_factory=dict)
    image_size: PositiveInt = 1024
    # Left out as published, so that a folder's description is what it was before there was this.
    vlm_view: VlmView = Field("whole", exclude_if=lambda view: view == "whole")
    max_condition_tokens: PositiveInt = 8192
    design_request: str | None = None
    design_max_new_tokens: PositiveInt = 1024  # of a blueprint by the model itself

    @field_validator("design_request")
    @classmethod
    def _has_instruction(cls, value: str | None) -> str | None:
        if value is not None and INSTRUCTION not in value:
            raise ValueError(f"must contain {INSTRUCTION}")
        return value


class ConnectorConfig(PartConfig):
    """The two-layer map from hidden states to conditions; ``weights`` is a safetensors file."""

    out_features: PositiveInt = 2304  # width of a condition token


class PainterConfig(PartConfig):
    """The SANA network and its null table.

    ``weights``: a folder in diffusers' format (or one that holds it as ``transformer/``); a
    ``null_condition.safetensors`` in it or beside it is read too. ``architecture``: keyword
    arguments of ``SanaTransformer2DModel``, used with null weights only; ``in_channels`` counts
    the noisy latent alone. ``source_latent``: the painter sees the source latent on extra input
    channels (an edit painter); weights without them are widened. ``condition_norm_scale``: where
    the condition norm starts when the weights are random.
    """

    architecture: dict[str, Any] = Field(default_factory=dict)
    null_condition_tokens: PositiveInt = 8192  # rows of the null table
    source_latent: bool = True
    integer_timesteps: bool = True  # truncated before the network sees them, as published
    condition_norm_scale: float = Field(default=0.01, gt=0)


class AutoencoderConfig(PartConfig):
    """The frozen DC-AE; ``architecture`` are keyword arguments of ``AutoencoderDC``."""

    architecture: dict[str, Any] = Field(default_factory=dict)


class SamplingConfig(StrictModel):
    """What edit and generate do unless told otherwise.

    ``resolution``: side in pixels of the square that the painter was made for. ``solver``: how a
    velocity becomes a step, see ``dim.model.sampler``. ``fit``: what of a source is edited.
    ``source``: all of it, painted in the nearest of SANA's shapes and given back at its own size.
    ``square``: the middle square, given back at ``resolution``, as published. ``step_cache``: the
    threshold of ``dim.model.step_cache``; 0 computes every step whole.
    """

    resolution: PositiveInt = 1024
    steps: PositiveInt = 30  # network evaluations
    guidance_scale: float = Field(default=7.5, ge=1)  # 1 = without classifier-free guidance
    shift: float = Field(default=3.0, gt=0)  # of the noise levels towards noise
    seed: int = Field(default=233, ge=0)  # of the noise
    solver: Solver = "dpm"
    fit: Fit = "source"
    # Left out where it is off, so that a folder's description is what it was before there was this.
    step_cache: float = Field(default=0.0, ge=0, lt=1, exclude_if=lambda threshold: not threshold)


class ModelConfig(StrictModel):
    """The five sections of a model file such as ``configs/tiny.yaml``."""

    understanding: UnderstandingConfig = UnderstandingConfig()
    connector: ConnectorConfig = ConnectorConfig()
    painter: PainterConfig = PainterConfig()
    autoencoder: AutoencoderConfig = AutoencoderConfig()
    sampling: SamplingConfig = SamplingConfig()

    def showing(self, view: VlmView) -> ModelConfig:
        """The same with another ``understanding.vlm_view``."""
        understanding = self.understanding.model_copy(update={"vlm_view": view})
        return self.model_copy(update={"understanding": understanding})

    @model_validator(mode="after")
    def _sizes_agree(self) -> ModelConfig:
        painter = self.painter.architecture
        _agree(
            "connector.out_features",
            self.connector.out_features,
            "painter.architecture.caption_channels",
            painter.get("caption_channels"),
        )
        _agree(
            "autoencoder.architecture.latent_channels",
            self.autoencoder.architecture.get("latent_channels"),
            "painter.architecture.in_channels",
            painter.get("in_channels"),
        )
        if self.painter.null_condition_tokens < self.understanding.max_condition_tokens:
            raise ValueError(
                "painter.null_condition_tokens must be at least understanding.max_condition_tokens"
            )
        return self


def weights_path(weights: str) -> str:
    """Where ``weights`` is: the folder of a ``package:tiny/NAME``, else the text as it is.

    Raises:
        CheckpointError: the package holds no weights of that name.
    """
    scheme, separator, name = weights.partition(":")
    if scheme != "package" or not separator:
        return weights
    section, _, rest = name.partition("/")
    path = Path(str(resources.files("dim"))) / section / "weights" / rest
    if not rest or not path.exists():
        raise CheckpointError(f"the package holds no weights {weights!r}")
    return str(path)


def require_choice(name: str, value: str, choices: Any) -> None:
    """Refuse a ``value`` that the ``Literal`` type ``choices`` does not list.

    Raises:
        InputError: names ``name``, the value and the choices.
    """
    if value not in get_args(choices):
        raise InputError(f"{name} {value!r} is not one of {', '.join(get_args(choices))}")


def _agree(name: str, value: Any, other_name: str, other: Any) -> None:
    if value is not None and other is not None and value != other:
        raise ValueError(f"{name} is {value} but {other_name} is {other}")
