"""The part of a stage's file that decides what it learns from, and so the features of its data."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from dim.config import StrictModel
from dim.errors import ConfigError
from dim.model.config import ModelConfig, VlmView
from dim.records import TextName

StageName = Literal["t2i", "edit1", "edit2"]

RESERVED_NAME = "sigma_q"
"""No source's name begins so: losses by noise level are called so beside those by source."""

_DEFAULT_TEXT: dict[StageName, TextName] = {
    "t2i": "caption",
    "edit1": "instruction",
    "edit2": "blueprint",
}


class Source(StrictModel):
    """One of the data sets that a stage mixes; a bare address in YAML is one of it alone.

    ``repeats``: how often an epoch has each of its samples; of a fraction it is a part of them,
    always the same. ``weight``, which all sources have or none: its part of the epoch, in
    proportion to the others'. ``cap``: how many of its samples are used at most, always the same.
    Which part or samples is a matter of the stage's seed. ``name``: what its loss is logged as.
    """

    uri: str  # output folder of a data job
    name: str | None = Field(default=None, pattern=r"^[\w.-]+$")
    weight: PositiveFloat | None = None  # its part of an epoch, in proportion to the others'
    repeats: PositiveFloat | None = None  # None = once
    cap: PositiveInt | None = None

    @model_validator(mode="wrap")
    @classmethod
    def _from_address(cls, value: Any, handler: ModelWrapValidatorHandler[Source]) -> Source:
        return handler({"uri": value} if isinstance(value, str) else value)

    @model_validator(mode="after")
    def _check_one_measure(self) -> Source:
        if self.weight is not None and self.repeats is not None:
            raise ValueError(f"{self.uri} has a weight and repeats: give one of them")
        return self

    @model_serializer(mode="wrap")
    def _to_address(self, handler: SerializerFunctionWrapHandler) -> Any:
        given = {name: value for name, value in handler(self).items() if value is not None}
        return given if len(given) > 1 else self.uri

    @property
    def changes_the_mixture(self) -> bool:
        """Whether an epoch has not simply each of its samples once."""
        return self.weight is not None or self.repeats not in (None, 1) or self.cap is not None


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
    ``dim data features`` makes them; addresses, or ``Source`` where they are mixed otherwise than
    by their sizes.

    ``buckets``: each sample is cut to the nearest of SANA's shapes (``dim.model.sizes``), and a
    batch holds one shape; otherwise every sample is a square of the model's resolution.
    ``vlm_view``: what the understanding model is shown of an edit's source. ``whole``: all of it,
    as published. ``region``: what the painter is given, no more.
    """

    stage: StageName  # what is trained, and from which text
    init: str
    data: list[Source] = Field(min_length=1)

    text: TextName | None = None  # None = caption for t2i, instruction for edit1, else blueprint
    text_mix: dict[TextName, PositiveFloat] | None = None  # instead: shares, drawn at each use
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16 = autocast; weights stay in float32
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

    @model_validator(mode="after")
    def _check_sources(self) -> StageInputs:
        weighted = [source.weight is not None for source in self.data]
        if any(weighted) and not all(weighted):
            lacking = self.data[weighted.index(False)].uri
            raise ValueError(f"data: {lacking} has no weight and others have: give all one or none")
        for name, count in Counter(self.source_names).items():
            if count > 1:
                raise ValueError(f"data: {count} sources are called {name!r}")
            if name.startswith(RESERVED_NAME):
                raise ValueError(
                    f"data: {name!r} is no name for a source: losses by noise level have it"
                )
        return self

    @property
    def uris(self) -> list[str]:
        """The addresses of ``data``."""
        return [source.uri for source in self.data]

    @property
    def source_names(self) -> list[str]:
        """A short name for each of ``data``: the given one, else what tells its address apart."""
        derived = iter(_short_names([source.uri for source in self.data if source.name is None]))
        return [source.name or next(derived) for source in self.data]

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


def _short_names(uris: Sequence[str]) -> list[str]:
    """The last parts of each address, as many as tell them apart; with a number if none do."""
    paths = []
    for uri in uris:
        found = urlsplit(uri)
        place = [part for part in found.path.split("/") if part not in ("", ".")]
        clean = [re.sub(r"[^\w.-]+", "_", part) for part in place or [found.hostname or "data"]]
        paths.append(clean)
    for count in range(1, max(map(len, paths), default=0) + 1):
        names = ["-".join(path[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [f"{'-'.join(path)}-{number}" for number, path in enumerate(paths, 1)]
