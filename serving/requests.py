"""From an HTTP body to a checked request, with OpenAI's field names and a few of our own."""

from __future__ import annotations

import json
from typing import Any, Literal, TypeVar

from fastapi import Request
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.types import Message

from serving.errors import BadRequestError, TooLargeError

MAX_TEXT = 32_000
MAX_SEED = 2**63 - 1

_BOOL = TypeAdapter(bool)


class PaintRequest(BaseModel):
    """What edits and generations have in common. Fields that are not known here are ignored.

    A form has only texts. What they mean is what the same value means in JSON, and a field that is
    empty or says ``null`` is not given: both kinds of body have the same results and errors.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    n: int = Field(1, ge=1, le=10)
    size: str = "auto"
    seed: int | None = Field(None, ge=0, le=MAX_SEED)
    steps: int | None = Field(None, ge=1)
    guidance_scale: float | None = Field(None, ge=1, le=100, allow_inf_nan=False)
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: Literal[False] = False

    @model_validator(mode="before")
    @classmethod
    def _only_what_is_given(cls, values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if _is_given(name, value)}

    @field_validator("n", "seed", "steps", "guidance_scale", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        value = _as_in_json(value)
        if isinstance(value, bool):
            raise PydanticCustomError("number", "Input should be a number, not true or false")
        return value

    @field_validator("stream", mode="before")
    @classmethod
    def _truth(cls, value: object) -> bool:
        return _BOOL.validate_python(_as_in_json(value))

    @field_validator("prompt")
    @classmethod
    def _says_something(cls, prompt: str) -> str:
        if not prompt.strip():
            raise ValueError("the prompt is blank")
        return prompt


class EditRequest(PaintRequest):
    """An edit: besides its image, who designs it or the blueprint it is painted from."""

    designer: str | None = None
    blueprint: str | None = Field(None, max_length=MAX_TEXT)
    mask: None = None


RequestT = TypeVar("RequestT", bound=PaintRequest)


async def read_json(request: Request, model: type[RequestT], max_bytes: int) -> RequestT:
    """The JSON body as ``model``.

    Raises:
        TooLargeError: the body has more than ``max_bytes``.
        BadRequestError: it is not a JSON object, or a field is missing or wrong.
    """
    try:
        values = json.loads(await limited(request, max_bytes).body())
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not valid JSON") from None
    if not isinstance(values, dict):
        raise BadRequestError("the body must be a JSON object")
    return checked(model, values)


async def read_edit(request: Request, max_bytes: int) -> tuple[EditRequest, bytes]:
    """The multipart body of an edit: its fields, and the encoded bytes of its one image.

    Raises:
        TooLargeError: the body has more than ``max_bytes``.
        BadRequestError: it is not multipart, has no image or several, or a field is wrong.
    """
    if not request.headers.get("content-type", "").startswith("multipart/form-data"):
        raise BadRequestError("the body must be multipart/form-data with an image and a prompt")
    body = limited(request, max_bytes)
    try:
        async with body.form(max_files=8, max_fields=64) as form:
            parts = form.multi_items()
            images = [
                value for name, value in parts if name in ("image", "image[]") and value != ""
            ]
            image = await _only_image(images)
    except HTTPException as error:
        raise BadRequestError(f"the body is not valid multipart: {error.detail}") from None
    return checked(EditRequest, dict(parts)), image


def _is_given(name: str, value: object) -> bool:
    """Whether a client says anything with a field: browsers and wrappers send what is not set."""
    if isinstance(value, UploadFile):
        return bool(value.size)
    if not isinstance(value, str) or name == "prompt":
        return value not in (None, "")
    said = value.strip()
    # "none" is a designer, so that "None" may mean that one and is left to be refused.
    return said not in ("", "null", "undefined") and (said != "None" or name == "designer")


def _as_in_json(value: object) -> object:
    """What a text says in JSON; itself where that is nothing."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value.lower())
    except (ValueError, RecursionError):
        return value


async def _only_image(files: list[UploadFile | str]) -> bytes:
    if len(files) != 1:
        count = "no image" if not files else f"{len(files)} images"
        raise BadRequestError(f"an edit takes exactly one image; got {count}", param="image")
    if isinstance(files[0], str):
        raise BadRequestError("image must be a file part, not text", param="image")
    return await files[0].read()


def limited(request: Request, max_bytes: int) -> Request:
    """``request`` with a body that raises ``TooLargeError`` as soon as it exceeds ``max_bytes``."""
    said = request.headers.get("content-length", "")
    if said.isdigit() and int(said) > max_bytes:
        raise TooLargeError(f"the request has {int(said):,} bytes, more than {max_bytes:,} allowed")
    received = 0

    async def receive() -> Message:
        nonlocal received
        message = await request.receive()
        received += len(message.get("body", b""))
        if received > max_bytes:
            raise TooLargeError(f"the request has more than the {max_bytes:,} bytes allowed")
        return message

    return Request(request.scope, receive)


def checked(model: type[RequestT], values: dict[str, Any]) -> RequestT:
    """``values`` as ``model``; the first field that is wrong is named."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else None
        raise BadRequestError(_say(name, first["msg"], model), param=name) from None


def _say(name: str | None, message: str, model: type[PaintRequest]) -> str:
    if name == "mask":
        return "mask is not supported: the prompt or blueprint says where the edit goes"
    if name in ("response_format", "output_format", "stream"):
        return f"{name} can only be {model.model_fields[name].default!r}"
    return f"{name}: {message[0].lower()}{message[1:]}"
