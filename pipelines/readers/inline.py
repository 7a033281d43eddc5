"""Images that stand in a record as text: ``data:`` URIs and base64, and the structs around them."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from dim.errors import InputError

_BASE64 = ("bytes", "base64", "b64_json", "b64")
HOLDERS = (*_BASE64, "data", "image_url", "url", "path")
"""Under which names a struct may hold an image, or say where it is; the first that does counts."""

_HEAD = 64  # characters that are enough to tell an image by
_SHORTEST = 24
_ALPHABET = re.compile(r"[A-Za-z0-9+/_-]+={0,2}['\"]?")
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG",
    b"GIF8",
    b"RIFF",
    b"II*\0",
    b"MM\0*",
    b"\0\0\0\x0cjP  ",
    b"\0\0\0\x0cJXL ",
)


def held(value: Any) -> Any:
    """What a struct holds: bytes, or a text; any other value is itself."""
    for _ in range(len(HOLDERS)):  # {"image_url": {"url": …}}
        if not isinstance(value, Mapping):
            break
        name = next((name for name in HOLDERS if value.get(name)), None)
        value = value[name] if name is not None else None
        if name in _BASE64 and isinstance(value, str) and not is_image_text(value):
            return f"data:;base64,{value}"  # whatever it is: not a name
    return value


def is_image_text(text: str) -> bool:
    """Whether a text is itself an image, and not the name of one."""
    return text[:5].lower() == "data:" or _is_base64(text)


def decoded(value: Any) -> Any:
    """The bytes of an image that a value is; any other value is itself.

    Takes bytes, also of a text; a list of the bytes as numbers; a ``data:`` URI; and base64 of
    either alphabet, with or without padding and line breaks, that begins as an image does.

    Raises:
        InputError: it is a ``data:`` URI or base64 that is damaged.
    """
    if isinstance(value, list) and value and all(_is_byte(item) for item in value):
        value = bytes(value)
    if isinstance(value, bytearray | memoryview):
        value = bytes(value)
    if isinstance(value, bytes):
        text = value[: 2 * _HEAD].decode("latin-1").strip()
        return decoded(value.decode("latin-1").strip()) if is_image_text(text) else value
    if not isinstance(value, str) or not is_image_text(value):
        return value
    if value[:5].lower() == "data:":
        return decoded(_of_uri(value))
    return _of_base64(value)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and 0 <= value < 256


def _is_base64(text: str) -> bool:
    head = "".join(_printed(text[: 2 * _HEAD]).split())[:_HEAD]
    if len(head) < _SHORTEST or not _ALPHABET.fullmatch(head):
        return False
    try:
        start = _of_base64(head[: len(head) // 4 * 4])
    except InputError:
        return False
    bitmap = start[:2] == b"BM" and start[6:10] == b"\0\0\0\0"
    return start.startswith(_STARTS) or start[4:8] == b"ftyp" or bitmap


def _printed(text: str) -> str:
    """Without the quotes of Python's bytes, which ``str()`` of them leaves around a text."""
    return text[2:].rstrip("'\"") if text.startswith(("b'", 'b"')) else text


def _of_uri(uri: str) -> bytes:
    head, comma, body = uri.partition(",")
    if not comma:
        raise InputError("a data: URI without data")
    if "base64" in [part.strip().lower() for part in head.split(";")[1:]]:
        return _of_base64(unquote(body))
    return unquote_to_bytes(body)


def _of_base64(text: str) -> bytes:
    plain = "".join(_printed(text).split()).translate({ord("-"): "+", ord("_"): "/"}).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"base64 that is damaged ({error})") from None
