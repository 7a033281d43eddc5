"""From an HTTP body to a checked edit: a form with files, or JSON with ``data:`` URLs."""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from serving.errors import BadRequestError, UnsupportedMediaTypeError, is_json, media_type
from serving.protocol import (
    Asked,
    BlueprintFields,
    BlueprintForm,
    BlueprintRequest,
    EditFields,
    EditForm,
    EditRequest,
    ImageReference,
    checked,
    is_given,
)

MAX_FILES, MAX_FIELDS = 8, 64
IMAGE_NAMES = ("image", "image[]")

_DATA_URL = re.compile(r"data:(?P<type>[\w.+/-]*)(?P<parameters>(?:;[\w.+=-]+)*),", re.ASCII)


@dataclass(frozen=True)
class Edit:
    """An edit's fields and its encoded pictures, which nobody has looked at yet."""

    fields: EditFields
    image: bytes
    mask: bytes | None

    @property
    def pictures(self) -> tuple[bytes | None, ...]:
        """All of them."""
        return self.image, self.mask


@dataclass(frozen=True)
class Design:
    """A blueprint's fields and the encoded picture that it is about."""

    fields: BlueprintFields
    image: bytes

    @property
    def pictures(self) -> tuple[bytes | None, ...]:
        """All of them: one."""
        return (self.image,)


async def read_edit(request: Request) -> Edit:
    """The edit that a body asks for, of either kind.

    Raises:
        UnsupportedMediaTypeError: it is neither a form nor JSON.
        BadRequestError: it is not what it says, has no image or several, or a field is wrong.
    """
    return Edit(*await _read(request, EditForm, EditRequest))


async def read_design(request: Request) -> Design:
    """The blueprint that a body asks for, of either kind; errors as of ``read_edit``."""
    fields, image, _ = await _read(request, BlueprintForm, BlueprintRequest)
    return Design(fields, image)


async def _read(
    request: Request, form: type[Asked], pictured: type[Asked]
) -> tuple[Any, bytes, bytes | None]:
    if media_type(request) == "multipart/form-data":
        return await _read_form(request, form)
    if is_json(request):
        return _read_json(await request.body(), pictured)
    raise UnsupportedMediaTypeError(
        "the body must be multipart/form-data with an image and a prompt, or application/json"
    )


async def _read_form(request: Request, model: type[Asked]) -> tuple[Any, bytes, bytes | None]:
    try:
        async with request.form(max_files=MAX_FILES, max_fields=MAX_FIELDS) as form:
            values = _only_once(form)
            image = await _file(values, "image")
            mask = await _file(values, "mask") if is_given("mask", values.get("mask")) else None
    except HTTPException as error:
        if error.status_code != 400:
            raise
        raise BadRequestError(f"the body is not valid multipart: {error.detail}") from None
    return checked(model, values), image, mask


def _only_once(form: FormData) -> dict[str, UploadFile | str]:
    """The fields of a form by their names; the image has two."""
    parts = form.multi_items()
    images = [value for name, value in parts if name in IMAGE_NAMES and value != ""]
    if len(images) != 1:
        raise _not_one_image(len(images))
    values = {name: value for name, value in parts if name not in IMAGE_NAMES}
    for name, count in Counter(name for name, _ in parts if name not in IMAGE_NAMES).items():
        if count > 1:
            raise BadRequestError(f"{name} is given {count} times", param=name)
    return {**values, "image": images[0]}


async def _file(values: dict[str, UploadFile | str], name: str) -> bytes:
    value = values[name]
    if isinstance(value, str):
        raise BadRequestError(f"{name} must be a file part, not text", param=name)
    return await value.read()


def _read_json(body: bytes, model: type[Asked]) -> tuple[Any, bytes, bytes | None]:
    try:
        values = json.loads(body)
    except (ValueError, RecursionError):
        raise BadRequestError("the body is not valid JSON") from None
    fields = checked(model, values)
    assert isinstance(fields, EditRequest | BlueprintRequest)
    if len(fields.images) != 1:
        raise _not_one_image(len(fields.images))
    image = read_data_url(fields.images[0], "images[0]")
    mask = fields.mask if isinstance(fields, EditRequest) else None
    return fields, image, None if mask is None else read_data_url(mask, "mask")


def read_data_url(reference: ImageReference, name: str) -> bytes:
    """The bytes that a ``data:`` URL holds (RFC 2397), of which only base64 is taken.

    Raises:
        BadRequestError: it is any other address, which the server would have to fetch, or damaged.
    """
    url, param = reference.image_url.strip(), f"{name}.image_url"
    found = _DATA_URL.match(url)
    if found is None:
        raise BadRequestError(
            f"{param} must be a data: URL with the picture itself; the server fetches nothing",
            param=param,
        )
    if not found["parameters"].lower().endswith(";base64"):
        raise BadRequestError(f"{param} is a data: URL without base64", param=param)
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError):
        raise BadRequestError(f"{param} is not valid base64", param=param) from None


def _not_one_image(count: int) -> BadRequestError:
    said = "no image" if count == 0 else f"{count} images"
    return BadRequestError(f"an edit takes exactly one image; got {said}", param="image")
