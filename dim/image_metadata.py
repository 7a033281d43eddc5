"""What an image file says beside its pixels: how the picture is turned and in which colours it is.

Metadata never decide whether pixels are good. Decoders stumble over a text that is too long, a
broken resolution or a checksum that nobody needs, so they are handed the file without all that
(:attr:`Metadata.pixels`), and the little that changes how a picture looks is read here, as far as
it can be: what is broken is as good as not there.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import ExifTags, Image

from dim.colour import SRGB_PRIMARIES, matrix_profile, video_profile

MAX_PROFILE_BYTES = 16 << 20
"""Of a colour profile unpacked; the parts of a JPEG's hold no more than this."""

# Of a text unpacked, and of all; of more, Pillow refuses the file, and no more is unpacked here.
_MAX_TEXT_BYTES, _MAX_TEXTS_BYTES = 1 << 20, 64 << 20

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_PNG_ANCILLARY = 0x20  # bit of a chunk's first letter: the decoder can do without it
_PNG_ANIMATION = (b"acTL", b"fcTL", b"fdAT")
_PNG_COLOURS = (b"cICP", b"sRGB", b"gAMA", b"cHRM")
# These come before the pixels; behind them they count as well, and others look at them too late.
_PNG_FIRST = frozenset({*_PNG_COLOURS, b"iCCP", b"pHYs"})
_PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_PNG_GREY = (b"\0", b"\4")  # colour types
_PNG_TRANSPARENT_BYTES = {b"\0": 2, b"\2": 6}  # by colour type: of the colour that is transparent
_PNG_XMP, _PNG_RAW_EXIF = b"XML:com.adobe.xmp", b"Raw profile type exif"
_SRGB_GAMMA, _GAMMA_TOLERANCE = 2.2, 0.05  # what is so near to it means sRGB, as for libpng

_JPEG = b"\xff\xd8\xff"
_JPEG_FILL, _JPEG_COMMENT, _JPEG_APPLICATION = 0xFF, 0xFE, range(0xE0, 0xF0)
_JPEG_STOP = frozenset({0x00, 0x01, *range(0xD0, 0xDB)})  # no length follows, or the first scan
# They say how the samples are meant; the decoder heeds them from this many bytes on.
_JPEG_NEEDED = {0xE0: (b"JFIF\0", 14), 0xEE: (b"Adobe", 12)}
_JPEG_EXIF, _JPEG_ICC = b"Exif\0\0", b"ICC_PROFILE\0"
_JPEG_XMP = b"http://ns.adobe.com/xap/1.0/\0"

_WEBP_METADATA = {b"ICCP": "icc_profile", b"EXIF": "exif", b"XMP ": "xmp"}
_WEBP_METADATA_FLAGS, _WEBP_ANIMATED = 0x20 | 0x08 | 0x04, 0x02

_TIFF_ORDERS = {b"II": "<", b"MM": ">"}
# What says how pixels lie in the file: sizes, depths, packing, strips, tiles, palette, inks, JPEG.
_TIFF_NEEDED = frozenset(
    {
        *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 292, 293),
        *(317, 320, 322, 323, 324, 325, 332, 338, 339, 347, *range(512, 522), 529, 530, 531, 532),
    }
)
_TIFF_ORIENTATION, _TIFF_XMP, _TIFF_PROFILE = 274, 700, 34675
_TIFF_INTEGERS, _TIFF_BYTES = {1: 1, 3: 2, 4: 4}, (1, 2, 7)  # types of tags (and their bytes)

_TIFF_MOST = 1000  # tags: no camera or program writes a tenth

_BMP_V5, _BMP_EMBEDDED = 124, b"DEBM"  # bytes of the header; what it calls a profile in the file


@dataclass(frozen=True)
class Metadata:
    """What :func:`read` found.

    Attributes:
        pixels: the file without what its pixels do not need; the very object if there is nothing
            to leave out. Of an animated PNG the still picture is left, of an MPO the first.
        orientation: 1 to 8, as in EXIF; 1 where nothing valid is said. A TIFF's own tag counts as
            part of its pixels: its decoder applies it.
        profile: an ICC profile of the colours; ``None``: they are sRGB.
        harmless: whether nothing in the file is known to make other readers stumble.
    """

    pixels: bytes
    orientation: int = 1
    profile: bytes | None = None
    harmless: bool = True


def read(data: bytes) -> Metadata:
    """The metadata of an encoded file of any format; whatever is wrong with it, nothing is raised.

    Nothing is decoded. The file is copied where something has to be left out.
    """
    if data.startswith(_PNG):
        return _read_png(data)
    if data.startswith(_JPEG):
        return _read_jpeg(data)
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X":
        return _read_webp(data)
    if data[:2] in _TIFF_ORDERS:
        return _read_tiff(data)
    return Metadata(data, profile=_bmp_profile(data) if data[:2] == b"BM" else None)


def orientation(info: Mapping[Any, Any]) -> int:
    """The orientation that an ``Image.info`` holds in its EXIF or else in its XMP, 1 to 8."""
    return _find_orientation(info)[0]


def valid_orientation(value: object) -> int:
    """``value`` if it is one of EXIF's eight orientations, else 1."""
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def profile(info: Mapping[Any, Any], *, grey: bool) -> bytes | None:
    """The profile of the colours that an ``Image.info`` names; ``None``: they are sRGB."""
    if info.get("icc_profile"):
        return bytes(info["icc_profile"])
    if "srgb" in info:
        return None
    return _screen_profile(info.get("gamma"), info.get("chromaticity"), grey=grey)


def _find_orientation(info: Mapping[Any, Any]) -> tuple[int, bool]:
    """The orientation, and whether everything that was looked at could be read."""
    sound = True
    for names in (("exif", "Raw profile type exif"), ("xmp", "XML:com.adobe.xmp")):
        holder = Image.new("1", (1, 1))
        holder.info = {name: info[name] for name in names if info.get(name)}
        if holder.info:
            try:
                found = holder.getexif().get(ExifTags.Base.Orientation)
            except Exception:  # broken EXIF can raise anything
                sound = False
                continue
            if found is not None:
                return valid_orientation(found), sound
    return 1, sound


@dataclass
class _Parts:
    """A file while it is gone through: what is kept of it, and what was noted."""

    data: bytes
    kept: list[tuple[int, int]] = field(default_factory=list)  # from and to
    end: bytes = b""  # to stand behind what is kept
    info: dict[str, Any] = field(default_factory=dict)  # as an ``Image.info`` has it
    harmless: bool = True
    unpacked: int = 0  # bytes of texts

    def keep(self, start: int, end: int) -> None:
        if self.kept and self.kept[-1][1] == start:
            start, _ = self.kept.pop()
        self.kept.append((start, end))

    def metadata(self, profile: bytes | None) -> Metadata:
        pixels = self.data
        if self.kept != [(0, len(pixels))]:
            view = memoryview(pixels)
            pixels = b"".join([*(view[start:end] for start, end in self.kept), self.end])
        turned, sound = _find_orientation(self.info)
        return Metadata(pixels, turned, profile, self.harmless and sound)


def _read_png(data: bytes) -> Metadata:
    """Chunks: length, kind, body and checksum. The critical ones and tRNS make the pixels."""
    parts, colours, view = _Parts(data), dict[bytes, bytes](), memoryview(data)
    place, drawn, ended = len(_PNG), False, False
    parts.keep(0, place)
    while place + 12 <= len(data) and not ended:
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if end > len(data) or not kind.isalpha():
            break
        if not kind[0] & _PNG_ANCILLARY:
            parts.keep(place, end)
            drawn, ended = drawn or kind == b"IDAT", kind == b"IEND"
        elif zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            parts.harmless = False
        elif kind == b"tRNS" and not drawn and length >= _PNG_TRANSPARENT_BYTES.get(data[25:26], 0):
            parts.keep(place, end)
        elif kind == b"tRNS":
            parts.harmless = False
        else:
            parts.harmless &= not drawn or kind not in _PNG_FIRST
            _note_png(kind, data[place + 8 : end - 4], parts, colours)
        place = end
    if drawn and not ended and data[place + 4 : place + 8] != b"IDAT":
        parts.end, parts.harmless = _PNG_END, False  # it breaks off behind its pixels
    else:
        parts.keep(place, len(data))
    return parts.metadata(_png_profile(colours, grey=data[25:26] in _PNG_GREY))


def _note_png(kind: bytes, body: bytes, parts: _Parts, colours: dict[bytes, bytes]) -> None:
    if kind in _PNG_ANIMATION:
        parts.harmless = False
    elif kind == b"eXIf":
        parts.info.setdefault("exif", body)
    elif kind in _PNG_COLOURS:
        colours.setdefault(kind, body)
    elif kind == b"iCCP" and kind not in colours:
        content, whole = _inflate(body.partition(b"\0")[2][1:], MAX_PROFILE_BYTES)
        parts.harmless &= whole and len(content) <= _MAX_TEXT_BYTES
        if whole:
            colours[kind] = content
    elif kind in _PNG_TEXTS:
        _note_png_text(kind, body, parts)


def _note_png_text(kind: bytes, body: bytes, parts: _Parts) -> None:
    key, _, text = body.partition(b"\0")
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind == b"iTXt":  # two flags, the language and the key in that language come first
        text = text[2:].split(b"\0", 2)[-1]
    elif kind == b"zTXt":
        parts.harmless &= text[:1] == b"\0"  # the only way of packing there is
        text = text[1:]
    if packed:
        if parts.unpacked > _MAX_TEXTS_BYTES:
            parts.harmless = False
            return
        text, whole = _inflate(text, _MAX_TEXT_BYTES)
        parts.unpacked += len(text)
        parts.harmless &= whole
    if key == _PNG_XMP:
        parts.info.setdefault("xmp", text)
    elif key == _PNG_RAW_EXIF:
        parts.info[key.decode()] = text.decode("latin-1")


def _inflate(packed: bytes, most: int) -> tuple[bytes, bool]:
    """The first ``most`` bytes of what is packed, and whether that is all of it, undamaged."""
    unpacker = zlib.decompressobj()
    try:
        data = unpacker.decompress(packed, most)
    except zlib.error:
        return b"", False
    return data, not unpacker.unconsumed_tail


def _png_profile(chunks: dict[bytes, bytes], *, grey: bool) -> bytes | None:
    """The colours that a PNG's chunks name, the first in PNG's own order of precedence."""
    if len(chunks.get(b"cICP", b"")) == 4:
        primaries, transfer, *_ = chunks[b"cICP"]
        profile = video_profile(primaries, transfer, grey=grey)
        if profile is not None:
            return profile
    if b"iCCP" in chunks:
        return chunks[b"iCCP"]
    if b"sRGB" in chunks:
        return None
    gamma = chromaticities = None
    if len(chunks.get(b"gAMA", b"")) == 4:
        gamma = int.from_bytes(chunks[b"gAMA"]) / 100_000
    if len(chunks.get(b"cHRM", b"")) == 32:
        chromaticities = tuple(n / 100_000 for n in struct.unpack(">8I", chunks[b"cHRM"]))
    return _screen_profile(gamma, chromaticities, grey=grey)


def _screen_profile(
    gamma: float | None, chromaticities: Sequence[float] | None, *, grey: bool
) -> bytes | None:
    """Of a screen as PNG describes it: the exponent from light to value, and what primaries it has.

    ``None`` if neither is said, or what is said means sRGB.
    """
    exponent = 1 / gamma if gamma else _SRGB_GAMMA
    curve = None if abs(exponent / _SRGB_GAMMA - 1) <= _GAMMA_TOLERANCE else exponent
    primaries = SRGB_PRIMARIES if grey or chromaticities is None else tuple(chromaticities)
    if curve is None and primaries == SRGB_PRIMARIES:
        return None
    return matrix_profile(primaries, curve, grey=grey)


def _read_jpeg(data: bytes) -> Metadata:
    """Segments up to the first scan: mark, length and body."""
    parts, profile, place = _Parts(data), list[bytes](), 2
    parts.keep(0, place)
    while place + 4 <= len(data):
        if data[place] != 0xFF:  # decoders pass over what is between segments
            place = data.find(b"\xff", place)
            if place < 0:
                return Metadata(data)
            continue
        marker = data[place + 1]
        if marker == _JPEG_FILL:
            place += 1
            continue
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4])
        if marker in _JPEG_STOP or not place + 4 <= end <= len(data):
            break
        if marker == _JPEG_COMMENT or marker in _JPEG_APPLICATION:
            _note_jpeg(place, end, parts, profile)
        else:
            parts.keep(place, end)
        place = end
    parts.keep(place, len(data))
    return parts.metadata(_jpeg_profile(profile))


def _note_jpeg(start: int, end: int, parts: _Parts, profile: list[bytes]) -> None:
    marker, body = parts.data[start + 1], parts.data[start + 4 : end]
    name, least = _JPEG_NEEDED.get(marker, (b"", 0))
    if name and body.startswith(name) and len(body) >= least:
        parts.keep(start, end)
    elif body.startswith(_JPEG_EXIF):
        parts.info.setdefault("exif", body[len(_JPEG_EXIF) :])
    elif body.startswith(_JPEG_XMP):
        parts.info.setdefault("xmp", body[len(_JPEG_XMP) :])
    elif body.startswith(_JPEG_ICC):
        profile.append(body[len(_JPEG_ICC) :])


def _jpeg_profile(parts: list[bytes]) -> bytes | None:
    """A profile put together; ``None`` if a part (number, count and content) is missing."""
    contents = {part[0]: part[2:] for part in parts if len(part) > 2}
    counts = {part[1] for part in parts if len(part) > 2}
    if not contents or counts != {len(contents)} or max(contents) != len(contents):
        return None
    return b"".join(contents[number] for number in sorted(contents))


def _read_webp(data: bytes) -> Metadata:
    """RIFF chunks (name, length, body, padding) of the extended form; others have no metadata."""
    said = 8 + int.from_bytes(data[4:8], "little")
    kept, info, place = list[bytes](), dict[str, Any](), 12
    while place + 8 <= min(said, len(data)):
        name, size = struct.unpack_from("<4sI", data, place)
        end = place + 8 + size
        if name in _WEBP_METADATA:
            info[_WEBP_METADATA[name]] = data[place + 8 : end]
        elif end > len(data):
            return Metadata(data)  # it breaks off within its pixels, which the decoder will say
        else:
            kept.append(data[place:end] + bytes(size % 2))
        place = end + size % 2
    whole = said <= len(data)
    pixels = data
    if (
        kept
        and len(kept[0]) > 8
        and (info or not whole)
        and (whole or not kept[0][8] & _WEBP_ANIMATED)
    ):
        first = bytearray(kept[0])
        first[8] &= ~_WEBP_METADATA_FLAGS
        body = b"".join([b"WEBP", first, *kept[1:]])
        pixels = b"RIFF" + struct.pack("<I", len(body)) + body
    turned, sound = _find_orientation(info)
    return Metadata(pixels, turned, info.get("icc_profile"), whole and sound)


def _read_tiff(data: bytes) -> Metadata:
    """The first directory of tags, which loses what its pixels do not need, and with it the file
    its further pictures."""
    order, big = _TIFF_ORDERS[data[:2]], data[2:4] in (b"+\0", b"\0+")
    head, tag, address = ("Q", "HHQ8s", "Q") if big else ("H", "HHI4s", "I")
    try:
        (start,) = struct.unpack_from(order + address, data, 8 if big else 4)
        (count,) = struct.unpack_from(order + head, data, start)
    except struct.error:
        return Metadata(data)  # there is no directory, which the decoder will say
    first, size = start + struct.calcsize(head), struct.calcsize(f"={tag}")
    if count > _TIFF_MOST or first + count * size + struct.calcsize(address) > len(data):
        return Metadata(data)
    info, profile, kept, turned = dict[str, Any](), None, list[bytes](), False
    for place in range(first, first + count * size, size):
        found = _TiffTag(order, *struct.unpack_from(order + tag, data, place))
        if found.number == _TIFF_XMP:
            info["xmp"] = found.content(data)
        elif found.number == _TIFF_PROFILE:
            profile = found.content(data)
        elif found.number in _TIFF_NEEDED or found.turns:
            kept.append(data[place : place + size])
            turned |= found.turns
    pixels = data
    if len(kept) < count:
        table = struct.pack(order + head, len(kept)) + b"".join(kept)
        table += bytes(struct.calcsize(address))  # there is no further directory
        pixels = b"".join((memoryview(data)[:start], table, memoryview(data)[start + len(table) :]))
    return Metadata(pixels, 1 if turned else orientation(info), profile)


@dataclass(frozen=True)
class _TiffTag:
    """An entry of a directory."""

    order: str
    number: int
    type: int
    count: int
    value: bytes  # or its address, if it does not fit here

    @property
    def turns(self) -> bool:
        """Whether it is a valid orientation."""
        size = _TIFF_INTEGERS.get(self.type, 0)
        return (
            self.number == _TIFF_ORIENTATION
            and self.count == 1
            and 1 <= self._number(self.value[:size]) <= 8
        )

    def content(self, data: bytes) -> bytes | None:
        """Its bytes, if it is made of bytes."""
        if self.type not in _TIFF_BYTES:
            return None
        if self.count <= len(self.value):
            return self.value[: self.count]
        start = self._number(self.value)
        return data[start : start + self.count]

    def _number(self, value: bytes) -> int:
        return int.from_bytes(value, "little" if self.order == "<" else "big")


def _bmp_profile(data: bytes) -> bytes | None:
    """The profile that a BMP with a header of version 5 may hold."""
    if len(data) < 14 + _BMP_V5 or int.from_bytes(data[14:18], "little") != _BMP_V5:
        return None
    if data[70:74] != _BMP_EMBEDDED:
        return None
    offset, size = struct.unpack_from("<II", data, 126)
    return data[14 + offset : 14 + offset + size]
