"""What goes over the wire: OpenAI's images API, with a few fields and routes of our own.

A form has only texts. What they mean is what the same value means in JSON, and a field that is
empty or says ``null`` is not given: both kinds of body have the same results and errors.
"""

from __future__ import annotations

import difflib
import json
from typing import Annotated, Any, Literal, TypeVar

from fastapi import UploadFile
from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile as File

from dim.reflection import MOST_CANDIDATES, MOST_ROUNDS
from serving.config import Consent
from serving.encoding import LOSSLESS, OutputFormat
from serving.errors import wrong_field

MAX_TEXT = 32_000
MAX_NAME = 200
MAX_SEED = 2**63 - 1
MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 3

Quality = Literal["auto", "low", "medium", "high", "standard", "hd"]

REFUSED = {
    "rounds": "only edits are looked at and painted again",
    "best_of": "only of edits the best is taken; n gives several images",
    "style": "the prompt says in which style",
    "svg": "only pixels are painted",
    "complexity": "quality or steps say how much is computed",
    "markup": "only image and mask are looked at",
    "frame_count": "one picture is painted, no animation",
    "frame_duration_ms": "one picture is painted, no animation",
    "file_id": "no files are kept here; send the picture as a data: URL",
}
"""Fields that clients know from elsewhere, and why they are not taken."""


def _number(value: object) -> object:
    value = _as_in_json(value)
    if isinstance(value, bool):
        raise PydanticCustomError("number", "Input should be a number, not true or false")
    return value


def _as_in_json(value: object) -> object:
    """What a text says in JSON; itself where that is nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except (ValueError, RecursionError):
        return value


Number = BeforeValidator(_number)
Truth = BeforeValidator(_as_in_json)


class Body(BaseModel):
    """A request's body: immutable, and a field that is not known is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _only_whatis_given(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = {name: value for name, value in values.items() if is_given(name, value)}
        for name in given:
            if name not in _names(cls):
                raise _unknown(name, cls)
        return given


class Asked(Body):
    """What all requests to the model have in common."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    model: str | None = Field(
        None, max_length=MAX_NAME, description="The served model's name, or `dim`."
    )
    stream: Annotated[bool, Truth] = Field(
        False, description="Answer in server-sent events, as things come about."
    )
    user: str | None = Field(None, description="Accepted; nothing here looks at it.")
    safety_identifier: str | None = Field(None, description="Accepted; nothing looks at it.")

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is blank")
        return prompt


class PaintRequest(Asked):
    """What edits and generations have in common."""

    n: Annotated[int, Number] = Field(1, ge=1, le=MAX_IMAGES)
    size: str = Field("auto", max_length=MAX_NAME, description="`auto` or WIDTHxHEIGHT in pixels.")
    quality: Quality = Field(
        "auto", description="How many steps: low half of the model's own, medium these, high twice."
    )
    output_format: OutputFormat = "png"
    output_compression: Annotated[int, Number] = Field(
        LOSSLESS,
        ge=0,
        le=LOSSLESS,
        description="Quality of JPEG and WebP; 100: lossless WebP.",
    )
    background: Literal["auto", "opaque"] = "auto"
    response_format: Literal["b64_json", "url"] = "b64_json"
    partial_images: Annotated[int, Number] = Field(
        0, ge=0, le=MAX_PARTIAL_IMAGES, description="In a stream: unfinished images, on the way."
    )
    seed: Annotated[int, Number] | None = Field(None, ge=0, le=MAX_SEED)
    steps: Annotated[int, Number] | None = Field(
        None, ge=1, validation_alias=AliasChoices("steps", "num_inference_steps")
    )
    guidance_scale: Annotated[float, Field(ge=1, le=100, allow_inf_nan=False), Number] | None = None
    negative_prompt: str | None = Field(
        None, max_length=MAX_TEXT, description="What to paint away from."
    )
    adapter: str | None = Field(
        None,
        max_length=MAX_NAME,
        description="A LoRA adapter of the server, by name; also as model=MODEL:ADAPTER.",
    )
    service_tier: Literal["auto", "default", "flex"] = Field(
        "auto", description="`flex`: behind all others, as `dim batch` asks."
    )
    moderation: Literal["auto", "low"] | None = Field(
        None, description="Accepted; nothing is moderated here."
    )

    @property
    def effective_quality(self) -> Literal["low", "medium", "high"] | None:
        """The quality that is asked for, in one word each; ``None``: the model's own steps."""
        words = {"standard": "medium", "hd": "high", "auto": None}
        return words.get(self.quality, self.quality)  # type: ignore[return-value]

    @model_validator(mode="before")
    @classmethod
    def _one_word_for_steps(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.keys() >= {"steps", "num_inference_steps"}:
            raise PydanticCustomError(
                "twice", "It is given as num_inference_steps too", {"field": "steps"}
            )
        return values

    @field_validator("background", mode="before")
    @classmethod
    def _opaque(cls, background: object) -> object:
        if background == "transparent":
            raise PydanticCustomError("opaque", "Images are painted opaque, not transparent")
        return background

    @model_validator(mode="after")
    def _agree(self) -> PaintRequest:
        if self.steps is not None and self.quality != "auto":
            raise PydanticCustomError(
                "twice", "It says how many steps: give quality or steps", {"field": "quality"}
            )
        if self.output_format == "png" and self.output_compression != LOSSLESS:
            raise PydanticCustomError(
                "png", "Only jpeg and webp have it", {"field": "output_compression"}
            )
        if self.partial_images and not self.stream:
            raise PydanticCustomError(
                "whole", "Only a stream (stream=true) has them", {"field": "partial_images"}
            )
        return self


class GenerationRequest(PaintRequest):
    """Images from a text."""


class EditFields(PaintRequest):
    """An edit, but for its pictures: who designs it, or the blueprint it is painted from."""

    designer: str | None = Field(
        None, max_length=MAX_NAME, description="One that the server offers, or `none`."
    )
    blueprint: str | None = Field(
        None, max_length=MAX_TEXT, description="Painted from as it is; no designer is asked."
    )
    rounds: Annotated[int, Number] = Field(
        1,
        ge=1,
        le=MOST_ROUNDS,
        description="The designer looks at the result and has it painted again, so often at most.",
    )
    best_of: Annotated[int, Number] = Field(
        1, ge=1, le=MOST_CANDIDATES, description="Images a round, of which it takes the best."
    )
    input_fidelity: Literal["high"] | None = Field(
        None, description="Accepted; every source is looked at in full."
    )
    consent: Annotated[bool, Truth] = Field(
        False, description="The edit may be kept for training, once accepted; see `contribution`."
    )

    @property
    def reviewed(self) -> bool:
        """Whether the designer looks at what was painted."""
        return self.rounds > 1 or self.best_of > 1

    @model_validator(mode="after")
    def _one_in_rounds(self) -> EditFields:
        for name, given in (("n", self.n > 1), ("partial_images", self.partial_images)):
            if self.reviewed and given:
                raise PydanticCustomError(
                    "one", "It does not go with rounds or best_of", {"field": name}
                )
        return self


class ImageReference(Body):
    """A picture within JSON."""

    image_url: str = Field(description="`data:image/png;base64,…`; no other address is read.")


class EditRequest(EditFields):
    """The JSON body of an edit."""

    images: tuple[ImageReference, ...] = Field(description="Exactly one.")
    mask: ImageReference | None = Field(
        None, description="A picture of the image's size; where it is transparent may change."
    )


class EditForm(EditFields):
    """The form of an edit."""

    image: UploadFile = Field(validation_alias=AliasChoices("image", "image[]"))
    mask: UploadFile | None = Field(
        None, description="A picture of the image's size; where it is transparent may change."
    )


class BlueprintFields(Asked):
    """A blueprint to be written, but for its picture."""

    designer: str | None = Field(
        None, max_length=MAX_NAME, description="One that the server offers."
    )


class BlueprintRequest(BlueprintFields):
    """The JSON body of a blueprint."""

    images: tuple[ImageReference, ...] = Field(description="Exactly one.")


class BlueprintForm(BlueprintFields):
    """The form of a blueprint."""

    image: UploadFile = Field(validation_alias=AliasChoices("image", "image[]"))


class CheckRequest(Body):
    """A text that may be a blueprint."""

    blueprint: str = Field(max_length=MAX_TEXT)
    prompt: str | None = Field(
        None, max_length=MAX_TEXT, description="Section 1 of a text that begins with section 2."
    )


SectionName = Literal["instruction", "global_layout", "local_objects", "edit_area", "imagination"]


class BlueprintResponse(BaseModel):
    """A blueprint: as text, and by its sections."""

    object: Literal["blueprint"] = "blueprint"
    blueprint: str
    sections: dict[SectionName, str]
    designer: str


class CheckResponse(BaseModel):
    """Whether a text is a blueprint; if not, what is wrong and in which section."""

    valid: bool
    section: SectionName | None
    message: str
    blueprint: str | None = Field(description="As it is painted from, without decoration.")


class Model(BaseModel):
    """The served model, or one of its adapters. The last six fields are ours."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the server started, in seconds since the epoch.")
    owned_by: Literal["dim"] = "dim"
    version: str
    designers: list[str]
    max_steps: int
    max_side: int
    adapter: str | None = Field(description="Which of its adapters the model is shown with.")
    contributions: Consent = Field(
        description="Whether your edits may be kept for training: never, if `consent` says so, or "
        "unless it says not."
    )


class Models(BaseModel):
    """What is served: one model, and it with each of its adapters."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """Whether the server can be used, and if not, why."""

    status: Literal["alive", "ready", "not ready"]
    message: str | None = None


class ErrorBody(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str | None


class TokenDetails(BaseModel):
    """Tokens by their kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens that were read and painted, in OpenAI's fields.

    ``input``: those that the understanding model reads for one image: of the text that is painted
    from (the blueprint, else the prompt) and of the negative prompt, and of the source.
    ``output``: those that the painter denoises, for all images. What a designer reads and writes
    is not counted.
    """

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImageData(BaseModel):
    """One painted image. All but the first three fields are ours."""

    b64_json: str | None = None
    url: str | None = None
    revised_prompt: str | None = None
    blueprint: str | None = None
    seed: int
    batch_size: int = Field(description="How many images shared its forward passes.")
    release: str = Field(description="The model that painted it, such as `dim/3`.")
    contribution: str | None = Field(
        None, description="With `consent`: by which name the edit can be accepted."
    )


class Reviewed(BaseModel):
    """An image that was painted in a round, from 1, and what the designer said of it."""

    round: int
    seed: int
    blueprint: str
    score: float | None = Field(description="From 0 to 10; null: there is no review.")
    accepted: bool
    missing: str = Field(description="In words; empty if nothing is.")
    error: str | None = Field(description="Why there is no review, or no new plan of it.")
    seconds: float = Field(description="Since the edit's first round began.")


class ImagesResponse(BaseModel):
    """OpenAI's answer with images; ``reviews`` is ours: of an edit in rounds, in order."""

    created: int
    data: list[ImageData]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["low", "medium", "high"] | None = Field(description="If it was asked for.")
    size: str
    usage: Usage
    reviews: list[Reviewed] | None = None


class AcceptRequest(Body):
    """An edit is as it was wanted."""

    blueprint: str | None = Field(
        None, max_length=MAX_TEXT, description="What describes it better than the one it has."
    )


class ContributionAnswer(BaseModel):
    """What has become of an edit that may be kept for training."""

    object: Literal["contribution"] = "contribution"
    id: str
    status: Literal["accepted", "forgotten"]


JobStatus = Literal["running", "succeeded", "failed", "cancelled"]


class Job(BaseModel):
    """A request that nobody waits for, and its answer once it is there."""

    object: Literal["job"] = "job"
    id: str
    status: JobStatus = "running"
    created_at: int
    deadline: int = Field(description="When it is given up, in seconds since the epoch.")
    result: ImagesResponse | BlueprintResponse | None = None
    error: ErrorBody | None = None


class Event(BaseModel):
    """Of a stream; ``type`` is its name."""

    type: str


class BlueprintDelta(Event):
    """A piece of the blueprint that is being written."""

    delta: str


class BlueprintDone(Event):
    """The blueprint that is painted from."""

    blueprint: str


class ReviewEvent(Event):
    """What the designer said of an image that was painted, and that image."""

    review: Reviewed
    b64_json: str | None = None
    url: str | None = None
    size: str
    output_format: OutputFormat


class ImageEvent(Event):
    """An image of a stream, the ``image_index``-th of the request, from 0."""

    b64_json: str | None = None
    image_index: int
    size: str
    quality: Literal["low", "medium", "high", "auto"]
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    created_at: int


class PartialImage(ImageEvent):
    """What an image looks like on the way, the ``partial_image_index``-th time, from 0."""

    partial_image_index: int


class Completed(ImageEvent):
    """A finished image; ``usage`` is that of this image alone."""

    url: str | None = None
    usage: Usage
    blueprint: str | None = None
    seed: int
    release: str
    contribution: str | None = None


class ErrorResponse(BaseModel):
    """OpenAI's answer to what cannot be done."""

    error: ErrorBody


BodyT = TypeVar("BodyT", bound=Body)


def checked(model: type[BodyT], values: Any) -> BodyT:
    """``values`` as ``model``.

    Raises:
        BadRequestError: it is no object, or a field is wrong; the first such field is named.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise wrong_field(error.errors()) from None


def _unknown(name: str, model: type[BaseModel]) -> PydanticCustomError:
    name = name[:MAX_NAME]
    said = f"No field {name!r} is known here"
    if name in REFUSED:
        said = f"Not supported, {REFUSED[name]}"
    elif near := difflib.get_close_matches(name, _names(model), n=1):
        said = f"{said}; did you mean {near[0]!r}?"
    return PydanticCustomError("unknown", "{said}", {"said": said, "field": name})


def _names(model: type[BaseModel]) -> list[str]:
    names: list[str] = []
    for name, field in model.model_fields.items():
        alias = field.validation_alias
        names += map(str, alias.choices) if isinstance(alias, AliasChoices) else [name]
    return names


def is_given(name: str, value: object) -> bool:
    """Whether a client says anything with a field: browsers and wrappers send what is not set."""
    if isinstance(value, File):
        return bool(value.size) or name == "image"  # an empty image is refused, not overlooked
    if not isinstance(value, str) or name == "prompt":
        return value not in (None, "")
    said = value.strip()
    # "none" is a designer, so that "None" may mean that one and is left to be refused.
    return said not in ("", "null", "undefined") and (said != "None" or name == "designer")
