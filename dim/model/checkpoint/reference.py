"""An understanding model that a DIM folder refers to and does not hold: whether it is the same."""

from __future__ import annotations

import hashlib
from pathlib import Path

from huggingface_hub import snapshot_download

from dim.errors import CheckpointError
from dim.model.config import weights_path

_EDGE = 1 << 20  # bytes that are hashed at each end of a weights file
_TEXTS = ("config.json", "tokenizer.json")
_WEIGHTS = "*.safetensors"


def everywhere(weights: str) -> str:
    """``weights`` as it can be referred to, wherever the folder that refers is read from."""
    return str(Path(weights).resolve()) if Path(weights).is_dir() else weights


def fingerprint(weights: str) -> str:
    """A hash of the understanding model at ``weights``: a folder, ``package:tiny/NAME``, a hub id.

    Configuration, tokenizer, and the sizes and both ends of its weights' files: the gigabytes
    between them would be read at every start, and other weights end otherwise.

    Raises:
        CheckpointError: it is not there.
    """
    folder = _folder(weights)
    files = sorted(folder.glob(_WEIGHTS))
    if not files:
        raise CheckpointError(f"the understanding model {weights} has no {_WEIGHTS}")
    digest = hashlib.sha256()
    try:
        for text in (folder / name for name in _TEXTS):
            digest.update(text.read_bytes() if text.is_file() else b"")
        for file in files:
            digest.update(_ends(file))
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {error.strerror or error}") from None
    return digest.hexdigest()


def require_same(where: Path, weights: str, expected: str) -> None:
    """Refuse an understanding model that is gone or has become another one.

    Args:
        where: the DIM folder that refers to it.
        weights: the place.
        expected: its fingerprint when the folder was written.

    Raises:
        CheckpointError: names folder and place.
    """
    try:
        found = fingerprint(weights)
    except CheckpointError as error:
        raise CheckpointError(f"{where} refers to an understanding model: {error}") from None
    if found != expected:
        raise CheckpointError(
            f"{where} refers to the understanding model {weights}, which is another one than when "
            "the folder was written"
        )


def _folder(weights: str) -> Path:
    """Its files on this machine; those of the hub come from the cache that transformers uses."""
    folder = Path(weights_path(weights))
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise CheckpointError(f"{weights} is not there")
    try:
        return Path(snapshot_download(weights, allow_patterns=[*_TEXTS, _WEIGHTS]))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{weights} is neither a folder nor to be had from the hub: {reason}"
        ) from None


def _ends(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        first = stream.read(_EDGE)
        stream.seek(max(0, size - _EDGE))
        return f"{size}\n".encode() + first + stream.read(_EDGE)
