"""Colours into sRGB: what a file's colour profile says its numbers mean, as a viewer shows them."""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

PROFILED_MODES = ("L", "RGB", "CMYK", "LAB")
"""What a profile may describe, as Pillow calls it; any other mode is brought to one of these."""

SRGB_PRIMARIES = (0.3127, 0.3290, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
"""x and y of white, red, green and blue."""

_CACHED_BYTES = 1 << 20  # of a profile; larger ones are rare, and not worth keeping
_SAME = 2  # levels of 255: a profile that never moves a colour further says sRGB in its own numbers
_GRID = 17  # steps a channel at which that is looked up

# ITU-T H.273, as PNG's cICP names them: BT.709, BT.2020 and P3 with the white of D65.
_VIDEO_PRIMARIES = {
    1: SRGB_PRIMARIES,
    9: (0.3127, 0.3290, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),
    12: (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),
}
_VIDEO_GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0, 13: None}  # exponents; None: the curve of sRGB

_D50 = np.array([0.9642, 1.0, 0.8249])  # the white of ICC's profile connection space, XYZ
_BRADFORD = np.array(
    [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
)
# IEC 61966-2-1 as ICC's parametric curve of type 3: g, a, b, c, d.
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)


def to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """``image`` (of one of :data:`PROFILED_MODES`) as 8-bit sRGB.

    Without a profile, and with one that is broken or for another kind of colours, RGB and grey are
    taken for sRGB, and CMYK and Lab are converted by formula.
    """
    transform = transform_of(profile, image.mode)
    return image.convert("RGB") if transform is None else transform.apply(image)


def transform_of(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From colours of ``mode`` to sRGB; ``None`` where they are sRGB or count as it.

    The intent is perceptual, which is what browsers and Pillow use: for a screen's or a camera's
    profile (a matrix and curves) that is the colorimetric one, for a printer's it is the table
    that its maker meant for pictures.
    """
    if mode == "LAB":
        return _transform(None, mode)
    if profile is None:
        return None
    make = _transform if len(profile) <= _CACHED_BYTES else _transform.__wrapped__
    return make(profile, mode)


@lru_cache(maxsize=64)
def _transform(profile: bytes | None, mode: str) -> ImageCms.ImageCmsTransform | None:
    try:
        if profile is None:
            source = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
        else:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        target = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
        transform = ImageCms.ImageCmsTransform(source, target, mode, "RGB")
    except Exception:  # a broken profile can raise anything, and one for other colours does
        return None
    return None if mode in ("L", "RGB") and _changes_nothing(transform, mode) else transform


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    levels = np.linspace(0, 255, _GRID).round().astype(np.uint8)
    if mode == "L":
        before = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    else:
        grid = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1)
        before = Image.fromarray(grid.reshape(_GRID, -1, 3))
    after = np.asarray(transform.apply(before), np.int16)
    return int(np.abs(after - np.asarray(before.convert("RGB"), np.int16)).max()) <= _SAME


def video_profile(primaries: int, transfer: int, *, grey: bool) -> bytes | None:
    """The profile of colours as video standards number them (ITU-T H.273).

    ``None`` for unknown numbers, and for the transfer functions of high dynamic range (PQ, HLG),
    of which only a choice of tones makes a picture for a screen.
    """
    if primaries not in _VIDEO_PRIMARIES or transfer not in _VIDEO_GAMMAS:
        return None
    return matrix_profile(_VIDEO_PRIMARIES[primaries], _VIDEO_GAMMAS[transfer], grey=grey)


def matrix_profile(
    chromaticities: Sequence[float], gamma: float | None, *, grey: bool
) -> bytes | None:
    """An ICC profile of a screen that is described by numbers.

    Args:
        chromaticities: x and y of white, red, green and blue.
        gamma: exponent from stored value to light; ``None``: the curve of sRGB.
        grey: for pictures without colour.

    Returns:
        The profile; ``None`` if the numbers describe nothing.
    """
    try:
        curve = _parametric_curve(gamma)
        tags = {b"wtpt": _xyz(_D50)}
        if grey:
            tags[b"kTRC"] = curve
        else:
            columns = _adapted_primaries(chromaticities).T
            for name, column in zip((b"r", b"g", b"b"), columns, strict=True):
                tags[name + b"XYZ"], tags[name + b"TRC"] = _xyz(column), curve
        return _assembled(tags, b"GRAY" if grey else b"RGB ")
    except (ArithmeticError, np.linalg.LinAlgError, struct.error, ValueError):
        return None


def _adapted_primaries(chromaticities: Sequence[float]) -> NDArray[np.float64]:
    """(3, 3) XYZ of red, green and blue in columns, brought from their white to D50."""
    x, y = np.array(chromaticities, np.float64).reshape(4, 2).T
    if y.min() <= 0:
        raise ValueError("a colour of no brightness")
    white, *colours = np.stack([x / y, np.ones(4), (1 - x - y) / y], axis=-1)
    primaries = np.stack(colours, axis=-1)
    primaries = primaries * np.linalg.solve(primaries, white)
    scale = np.diag((_BRADFORD @ _D50) / (_BRADFORD @ white))
    return np.linalg.inv(_BRADFORD) @ scale @ _BRADFORD @ primaries


def _parametric_curve(gamma: float | None) -> bytes:
    kind, numbers = (3, _SRGB_CURVE) if gamma is None else (0, (gamma,))
    return struct.pack(">4sIHH", b"para", 0, kind, 0) + b"".join(map(_fixed, numbers))


def _xyz(values: NDArray[np.float64]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(float(value) * 65536))


def _assembled(tags: dict[bytes, bytes], space: bytes) -> bytes:
    """A profile of a monitor, version 4 (ICC.1:2022): header, table of tags, tags."""
    start = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(value))
        body += value
    header = struct.pack(
        ">I4sI4s4s4s12x4s",
        start + len(body),
        b"\0" * 4,
        0x04200000,
        b"mntr",
        space,
        b"XYZ ",
        b"acsp",
    )
    white = b"".join(map(_fixed, _D50))
    return (header.ljust(68, b"\0") + white).ljust(128, b"\0") + table + body
