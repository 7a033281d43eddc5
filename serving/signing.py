"""C2PA: painted images say by whose server they were painted, under its certificate's signature.

What :mod:`dim.provenance` writes anybody can write. A C2PA manifest holds the same, a hash of the
whole file, and a signature: whoever trusts the certificate knows that the server made this very
file. Needs the package ``c2pa-python``.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image

from dim import __version__
from dim.errors import ConfigError
from serving.config import SigningConfig
from serving.encoding import Output, encode

Sign = Callable[[bytes, Output, bool], bytes]
"""A painted file, as what it was made, and whether it is an edit → the same file, signed."""

LABEL = "org.draw-in-mind.provenance"
"""The assertion that holds what the image says of itself."""

_SOURCES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_GENERATED, _EDITED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"


def open_signer(config: SigningConfig | None) -> Sign | None:
    """What signs images as ``config`` says; ``None`` if nothing does. One image is signed to see.

    Raises:
        ConfigError: the package is missing, or certificate and key cannot be read or used.
    """
    if config is None:
        return None
    try:
        import c2pa
    except ImportError:
        raise ConfigError("signing needs the package c2pa-python, which is not installed") from None
    certificate, key = _read(config.certificate), _read(config.key)
    try:
        # The authority, where there is one, is asked for the time of every signature.
        info = c2pa.C2paSignerInfo(config.algorithm, certificate, key, config.timestamp_url)
        signer = c2pa.Signer.from_info(info)

        def sign(data: bytes, output: Output, edited: bool) -> bytes:
            signed = io.BytesIO()
            with c2pa.Builder(json.dumps(manifest(output, edited))) as builder:
                builder.sign(signer, f"image/{output.format}", io.BytesIO(data), signed)
            return signed.getvalue()

        sign(encode(Image.new("RGB", (8, 8)), Output()), Output(), False)
    except (c2pa.C2paError, ValueError):  # whose text may quote the key
        raise ConfigError(
            f"signing: {config.certificate} and {config.key} are no certificate chain and key for "
            f"C2PA's {config.algorithm}, or the time stamp authority does not answer"
        ) from None
    return sign


def manifest(output: Output, edited: bool) -> dict[str, Any]:
    """What is signed of an image, beside the hash of its file."""
    source = f"{_SOURCES}{_EDITED if edited else _GENERATED}"
    created = {"action": "c2pa.created", "digitalSourceType": source}
    return {
        "claim_generator_info": [{"name": "Draw-In-Mind", "version": __version__}],
        "format": f"image/{output.format}",
        "assertions": [
            {"label": "c2pa.actions", "data": {"actions": [created]}},
            {"label": LABEL, "data": dict(output.metadata)},
        ],
    }


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"signing: cannot read {path}: {error.strerror or error}") from None
