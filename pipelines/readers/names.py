"""Names of files: which are hidden, how else one may have been written, how one is shown."""

from __future__ import annotations

import re
import unicodedata
from pathlib import PurePosixPath
from urllib.parse import unquote

from dim.redaction import redact

_LEFT_BEHIND = {
    *("__macosx", "__pycache__", "_temporary", "lost+found"),
    *("@eadir", "#recycle", "$recycle.bin", "system volume information"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
"""What systems and programs leave in folders, in lower case."""

_IMAGES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp"),
    *(".bmp", ".dib", ".gif", ".tif", ".tiff"),
}
_SHOWN = 160
_SAID = 200


def is_hidden(name: str) -> bool:
    """Whether a file is hidden: it, or a folder on the way to it, begins with a dot, or is one of
    those that systems leave behind.

    Args:
        name: relative to the folder that somebody named, which may itself be called anything.
    """
    return any(
        (part.startswith(".") and part not in (".", "..")) or part.lower() in _LEFT_BEHIND
        for part in name.split("/")
    )


def is_hidden_table(name: str) -> bool:
    """The same for Parquet and Arrow files, among which a leading ``_`` hides as well (but not
    that of a partition, ``_key=value``), and so does the ``cache-`` of Hugging Face."""
    parts = name.split("/")
    return (
        is_hidden(name)
        or parts[-1].startswith("cache-")
        or any(part.startswith("_") and "=" not in part for part in parts)
    )


def is_image(name: str) -> bool:
    """Whether a name is one of an image file."""
    return f".{name.rpartition('.')[2].lower()}" in _IMAGES


def without_suffix(name: str) -> str:
    """A file's name without its last suffix."""
    return str(PurePosixPath(name).with_suffix(""))


def spellings(name: str) -> list[str]:
    """How else a name may be meant that another system wrote, itself not among them.

    With ``/`` for ``\\``, without ``./`` and ``//``, with ``%20`` and the like decoded, and with
    accents as letters of their own or not (NFC and NFD).
    """
    if name.isascii() and not re.search(r"\\|%|(^|/)\.?/", name):
        return []
    plain = {name, unquote(name)}
    slashed = plain | {text.replace("\\", "/") for text in plain}
    short = slashed | {str(PurePosixPath(text)) for text in slashed}
    forms = {unicodedata.normalize(form, text) for text in short for form in ("NFC", "NFD")}
    return sorted((short | forms) - {name})


def plain(name: str) -> str:
    """The one spelling that all spellings of a name come down to."""
    if name.isascii() and not re.search(r"\\|%|(^|/)\.?/", name):
        return name
    slashed = unquote(name).replace("\\", "/")
    return unicodedata.normalize("NFC", str(PurePosixPath(slashed)))


def without_case(name: str) -> str:
    """What names have in common that differ in letter case or in the form of their accents."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def said(error: Exception) -> str:
    """What a library says of a damaged file, on one line that is never long."""
    return " ".join(str(error).split())[:_SAID]


def shown(value: object) -> str:
    """A value for a message: never long, and without the credentials of an address."""
    text = str(value)
    if len(text) <= _SHOWN:
        return redact(text)
    return f"{redact(text[: _SHOWN // 2])}… ({len(text):,} characters)"
