"""Filters: which images and pairs are worth a designer's time."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from skimage.metrics import structural_similarity

from dim import records
from dim.config import StrictModel
from dim.errors import InputError
from dim.images import decode_image
from pipelines.stages.outcome import Rejection, Row, to_rows, to_table, work_on

_ORIENTATION = 0x0112  # EXIF tag; values above 4 turn the image by a quarter
_VISIBLE = 16  # difference in 8-bit levels that counts as a changed pixel: above JPEG noise
_SSIM_WINDOW = 7

Grey = NDArray[np.float32]


class ImageRules(StrictModel):
    """What a single image must be."""

    min_side: int = 256
    """Shorter side in pixels, at least."""
    max_pixels: int = 50_000_000
    """Width x height at most; read off the header, before anything is decoded."""
    max_aspect: float = 4.0
    """Longer side over shorter side, at most."""


class PairRules(ImageRules):
    """What an edit pair must be."""

    max_aspect_change: float = 0.05
    """Relative difference between the aspect ratios of source and target, at most."""
    change_side: int = 256
    """Changed pixels are counted at this longer side (smaller pairs at their own size)."""
    min_changed: float = 0.001
    """Share of the pixels that visibly changes, at least; below, nothing was edited."""
    ssim_side: int = 32
    """Structural similarity is taken at this longer side in pixels. So small, it compares layouts:
    a new style keeps them, where at full size it leaves no more similarity than chance does."""
    min_ssim: float = 0.1
    """Structural similarity of the luminance, at least; below, it is another picture. Low, because
    a new background changes most of a layout too; what passes wrongly is left to triage."""


@dataclass(frozen=True)
class FilterImages:
    """Keep the single images that decode completely and meet the rules."""

    rules: ImageRules

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw images in, the same with outcomes out."""
        rows = to_rows(batch)
        work_on(rows, "filter", self._check)
        return to_table(rows, records.RAW_IMAGE)

    def _check(self, row: Row) -> None:
        open_checked(row["image"], "the image", self.rules)


@dataclass(frozen=True)
class FilterPairs:
    """Keep the pairs whose images decode, meet the rules, and differ by an edit."""

    rules: PairRules

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Raw pairs in, the same with outcomes out."""
        rows = to_rows(batch)
        work_on(rows, "filter", self._check)
        return to_table(rows, records.RAW_PAIR)

    def _check(self, row: Row) -> None:
        if not (row["instruction"] or "").strip():
            raise Rejection("pair.no_instruction", "the instruction is empty")
        if row["image_hash"] == row["image_target_hash"]:
            raise Rejection("pair.unchanged", "source and target are the same file", 0.0)
        source = open_checked(row["image"], "the source", self.rules)
        target = open_checked(row["image_target"], "the target", self.rules)
        check_pair(source, target, self.rules)


def probe(image: bytes, name: str) -> tuple[int, int]:
    """Width and height of an encoded image as it is to be seen, read off its header.

    Raises:
        Rejection: ``image.undecodable`` or ``image.too_large``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(image)) as opened:
                width, height = opened.size
                # Pillow decodes a whole PNG to look for EXIF behind its pixels; few have any.
                exif = {} if opened.format == "PNG" else opened.getexif()
                turned = exif.get(_ORIENTATION, 1) > 4
    except UnidentifiedImageError:
        raise Rejection("image.undecodable", f"{name} is not an image") from None
    except Image.DecompressionBombError:
        raise Rejection("image.too_large", f"{name} has far too many pixels") from None
    except Exception as error:  # a damaged header can raise anything
        raise Rejection("image.undecodable", f"{name} is damaged: {error}") from None
    return (height, width) if turned else (width, height)


def open_checked(image: bytes, name: str, rules: ImageRules) -> Image.Image:
    """``image`` decoded (upright RGB), its header checked against the rules first.

    Raises:
        Rejection: ``image.undecodable``, ``.too_large``, ``.too_small`` or ``.aspect``.
    """
    width, height = probe(image, name)
    size = f"{name} is {width} x {height} px"
    if width * height > rules.max_pixels:
        raise Rejection("image.too_large", size, width * height, rules.max_pixels)
    if min(width, height) < rules.min_side:
        raise Rejection("image.too_small", size, min(width, height), rules.min_side)
    aspect = max(width, height) / min(width, height)
    if aspect > rules.max_aspect:
        raise Rejection("image.aspect", size, aspect, rules.max_aspect)
    try:
        return decode_image(image, name=name, max_pixels=rules.max_pixels)
    except InputError as error:
        raise Rejection("image.undecodable", str(error)) from None


def check_pair(source: Image.Image, target: Image.Image, rules: PairRules) -> None:
    """Compare two decoded images, each rule at its own common size.

    Raises:
        Rejection: ``pair.size_mismatch``, ``pair.unchanged`` or ``pair.ssim_low``.
    """
    change = abs(source.width * target.height / (source.height * target.width) - 1)
    if change > rules.max_aspect_change:
        sizes = f"{source.width} x {source.height} and {target.width} x {target.height} px"
        raise Rejection("pair.size_mismatch", sizes, change, rules.max_aspect_change)
    changed = changed_share(*_at_common_size(source, target, rules.change_side))
    if changed < rules.min_changed:
        detail = f"{changed:.2%} of the pixels change"
        raise Rejection("pair.unchanged", detail, changed, rules.min_changed)
    similarity = ssim(*map(luminance, _at_common_size(source, target, rules.ssim_side)))
    if similarity < rules.min_ssim:
        detail = f"structural similarity {similarity:.3f}"
        raise Rejection("pair.ssim_low", detail, similarity, rules.min_ssim)


def _at_common_size(
    source: Image.Image, target: Image.Image, longest: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Both as (H, W, 3), at the source's size or scaled down to ``longest``."""
    scale = min(1.0, longest / max(source.size))
    width, height = (max(_SSIM_WINDOW, round(side * scale)) for side in source.size)
    before, after = (_resized(image, (width, height)) for image in (source, target))
    return np.asarray(before), np.asarray(after)


def changed_share(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> float:
    """Share of pixels that differ visibly in some channel; both (H, W, 3)."""
    difference = np.abs(before.astype(np.int16) - after.astype(np.int16)).max(axis=-1)
    return float((difference > _VISIBLE).mean())


def luminance(pixels: NDArray[np.uint8]) -> Grey:
    """(H, W, 3) sRGB to (H, W) luma in [0, 1], ITU-R BT.601 weights."""
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32) / 255).astype(np.float32)


def ssim(before: Grey, after: Grey) -> float:
    """Mean structural similarity (Wang et al. 2004) of two luma images in [0, 1]."""
    value = structural_similarity(before, after, win_size=_SSIM_WINDOW, data_range=1.0)
    return float(value)


def _resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return image if image.size == size else image.resize(size, Image.Resampling.BOX)
