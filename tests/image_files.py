"""Image files with whatever a test wants in them: chunks, segments, tags and colour profiles."""

from __future__ import annotations

import io
import itertools
import struct
import zlib
from collections.abc import Iterable

import numpy as np
from PIL import Image

from dim.colour import matrix_profile

ORIENTATION = 0x0112

# How to store a picture so that an orientation brings it back upright.
TURNED_BACK = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}

ADOBE_RGB = (0.3127, 0.3290, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
DISPLAY_P3 = (0.3127, 0.3290, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060)


def opened(data: bytes) -> Image.Image:
    """A file as Pillow opens it."""
    return Image.open(io.BytesIO(data))


def exif(orientation: int) -> Image.Exif:
    """EXIF that says how a picture is turned."""
    tags = Image.Exif()
    tags[ORIENTATION] = orientation
    return tags


def xmp(orientation: int) -> bytes:
    """XMP that says it."""
    return (
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description '
        b'tiff:Orientation="%d"/></rdf:RDF></x:xmpmeta>' % orientation
    )


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    """A chunk of a PNG."""
    if checksum is None:
        checksum = zlib.crc32(kind + body)
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def packed_text(text: bytes, key: bytes = b"note", kind: bytes = b"zTXt") -> bytes:
    """A chunk of compressed text."""
    marks = b"\0\0" if kind == b"zTXt" else b"\0\1\0\0\0"
    return chunk(kind, key + marks + zlib.compress(text))


def with_chunks(png: bytes, *chunks: bytes, behind: bool = False) -> bytes:
    """A PNG with chunks before its pixels, or behind them."""
    place = (png.rindex(b"IEND") if behind else png.index(b"IDAT")) - 4
    return png[:place] + b"".join(chunks) + png[place:]


def raw_png(width: int, bits: int, colour_type: int, rows: Iterable[bytes]) -> bytes:
    """A PNG of any depth and colour type, which Pillow does not write."""
    lines = list(rows)
    header = struct.pack(">IIBBBBB", width, len(lines), bits, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + line for line in lines))
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", pixels), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def with_segment(jpeg: bytes, marker: int, body: bytes) -> bytes:
    """A JPEG with one more segment at its beginning."""
    return jpeg[:2] + struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body + jpeg[2:]


def raw_tiff(
    size: tuple[int, int], bits: list[int], photometric: int, pixels: bytes, **tags: list[int]
) -> bytes:
    """A little-endian TIFF with its samples as they are given; ``tags``: ``t338=[2]``."""
    shorts = {
        **{256: [size[0]], 257: [size[1]], 258: bits, 259: [1], 262: [photometric], 273: [0]},
        **{277: [len(bits)], 278: [size[1]], 279: [len(pixels)]},
        **{int(name[1:]): values for name, values in tags.items()},
    }
    start = 8 + 2 + 12 * len(shorts) + 4
    entries, far = b"", b""
    place = start + sum(4 * len(values) for values in shorts.values() if len(values) > 1)
    for tag, values in sorted(shorts.items()):
        values = [place] if tag == 273 else values
        data = struct.pack(f"<{len(values)}I", *values)
        where = data if len(values) == 1 else struct.pack("<I", start + len(far))
        far += data if len(values) > 1 else b""
        entries += struct.pack("<HHI", tag, 4, len(values)) + where
    return struct.pack("<2sHIH", b"II", 42, 8, len(shorts)) + entries + bytes(4) + far + pixels


def screen(primaries: tuple[float, ...], gamma: float | None = None, grey: bool = False) -> bytes:
    """The profile of a screen."""
    profile = matrix_profile(primaries, gamma, grey=grey)
    assert profile is not None
    return profile


def printer() -> bytes:
    """The profile of a printer with four inks, by a table of its 16 full mixtures in Lab."""
    paper = np.array([100.0, 0.0, 0.0])
    inks = np.array([[55, -37, -50], [48, 74, -3], [89, -5, 93], [16, 0, 0]], float)  # C M Y K
    nodes = []
    for mixture in itertools.product((0, 1), repeat=4):
        lab = paper.copy()
        for on, ink in zip(mixture, inks, strict=True):
            lab = lab * [ink[0] / 100, 1, 1] + ink * [0, 1, 1] if on else lab
        nodes.append([lab[0] * 2.55, *(lab[1:].clip(-128, 127) + 128)])
    table = np.array(nodes).round().clip(0, 255).astype(np.uint8).tobytes()
    straight = bytes(range(256))
    unit = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    lut = b"mft1\0\0\0\0\x04\x03\x02\0" + unit + straight * 4 + table + straight * 3
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"A2B0": lut, b"wtpt": white}
    start = 128 + 4 + 12 * len(tags)
    listed, body = struct.pack(">I", len(tags)), b""
    for name, value in tags.items():
        listed += struct.pack(">4sII", name, start + len(body), len(value))
        body += value + bytes(-len(value) % 4)
    head = struct.pack(
        ">I4xI4s4s4s12x4s", start + len(body), 0x02400000, b"prtr", b"CMYK", b"Lab ", b"acsp"
    )
    return head.ljust(68, b"\0") + white[8:] + bytes(48) + listed + body
