"""What the filters measure: pure functions of decoded pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.fft import dctn
from skimage.metrics import structural_similarity
from skimage.registration import phase_cross_correlation

SSIM_WINDOW = 7
HASH_BITS = 64

_VISIBLE = 16  # difference in 8-bit levels that counts as a changed pixel: above JPEG noise
_HASH_SIDE, _HASH_LOW = 32, 8
_ENTROPY_SIDE = 64
_STROKE = 30  # step between neighbours, in 8-bit levels, above which it is the edge of a letter
_LINE_HEIGHT = (0.012, 0.12)  # of a line of text, over the longer side
_LINE_LENGTH = 2.5  # width over height, at least: a word, not a dot
_LINE_INK = (0.2, 0.9)  # share of stroke edges within a line's box
_EXPLAINED = 0.5  # a shift counts when undoing it leaves less than this share of the difference

Pixels = NDArray[np.uint8]
Grey = NDArray[np.float32]


def scaled(image: Image.Image, longest: int) -> Image.Image:
    """``image`` with a longer side of at most ``longest`` pixels; small ones stay as they are."""
    scale = longest / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return resized(image, (width, height))


def resized(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """``image`` at exactly ``size`` (width, height), each pixel the mean of those it replaces."""
    if image.size == size:
        return image
    (across, odd), (down, uneven) = map(divmod, image.size, size)
    if not (odd or uneven):
        return image.reduce((across, down))  # the same mean, in a third of the time
    return image.resize(size, Image.Resampling.BOX)


def at_common_size(
    source: Image.Image, target: Image.Image, longest: int
) -> tuple[Image.Image, Image.Image]:
    """Both at the source's size, or scaled down to ``longest``; no side under the SSIM window."""
    scale = min(1.0, longest / max(source.size))
    width, height = (max(SSIM_WINDOW, round(side * scale)) for side in source.size)
    return resized(source, (width, height)), resized(target, (width, height))


def grey(image: Image.Image) -> Grey:
    """(H, W) luma in [0, 1] of a picture, in 8-bit steps."""
    return levels(image).astype(np.float32) / np.float32(255)


def levels(image: Image.Image) -> Pixels:
    """(H, W) luma of a picture, in 8-bit levels."""
    return np.asarray(image.convert("L"))


def entropy(luma: Image.Image) -> float:
    """Shannon entropy of the levels of a grey picture in bits: 0 for a flat one, at most 8.

    Taken at 64 px, where the noise of a camera or of compression on a blank picture is averaged
    away.
    """
    small = levels(scaled(luma, _ENTROPY_SIDE))
    share = np.bincount(small.ravel(), minlength=256) / small.size
    share = share[share > 0]
    return float(-(share * np.log2(share)).sum()) + 0.0  # no minus zero


def sharpness(luma: Pixels) -> float:
    """Variance of the Laplacian (Pech-Pacheco et al. 2000) of (H, W) 8-bit luma, as of [0, 1]."""
    near = np.pad(luma.astype(np.int16), 1, mode="edge")
    across = near[1:-1, :-2] + near[1:-1, 2:]
    down = near[:-2, 1:-1] + near[2:, 1:-1]
    edges = (across + down - 4 * near[1:-1, 1:-1]).ravel().astype(np.float64)
    # Its sum is 0: what a pixel gives, its neighbour takes. All is whole numbers, so exact.
    return float(edges @ edges / edges.size / 255**2)


def text_area(luma: Pixels) -> float:
    """Share of (H, W) 8-bit luma that looks like lines of text, or a watermark of such lines.

    Strong edges are joined sideways; what comes out flat, long and full of strokes is taken for a
    line. A heuristic without a model: it sees horizontal lines of contrasting strokes. It misses
    faint, slanted, vertical and very large letters, and takes railings or brickwork for text, so
    its threshold belongs well above what a street sign covers.
    """
    longest = max(luma.shape)
    strokes = np.zeros(luma.shape, np.bool_)
    strokes[:, :-1] |= _apart(luma[:, 1:], luma[:, :-1]) > _STROKE
    strokes[:-1] |= _apart(luma[1:], luma[:-1]) > _STROKE
    reach = max(3, round(longest * 0.02))
    joined = _within(strokes, reach, np.logical_or)
    joined = _within(joined, reach, np.logical_and)
    pieces, count = ndimage.label(joined)
    if not count:
        return 0.0
    boxes = np.array([[s.start, s.stop] for pair in ndimage.find_objects(pieces) for s in pair])
    (top, bottom), (left, right) = boxes[::2].T, boxes[1::2].T
    height, width = bottom - top, right - left
    ink = np.bincount(pieces[strokes], minlength=count + 1)[1:] / (height * width)
    low, high = (share * longest for share in _LINE_HEIGHT)
    is_line = (height >= max(3, low)) & (height <= high) & (width >= _LINE_LENGTH * height)
    is_line &= (ink >= _LINE_INK[0]) & (ink <= _LINE_INK[1])
    return float(min(1.0, (height * width)[is_line].sum() / luma.size))


def perceptual_hash(image: Image.Image) -> int:
    """64-bit pHash (Zauner 2010): which low frequencies of the 32 x 32 luma are above the median.

    Compression, scaling and small changes of brightness move few of the bits.
    """
    small = np.asarray(resized(image.convert("L"), (_HASH_SIDE, _HASH_SIDE)), np.float64)
    low = dctn(small, norm="ortho")[:_HASH_LOW, :_HASH_LOW].ravel()
    low[0] = 0.0  # the mean brightness says nothing about the picture
    # Rounded, so that the frequencies a flat picture does not have are all equal on any machine.
    bits = np.round(low, 6) > np.round(np.median(low), 6)
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def changed_share(before: Pixels, after: Pixels) -> float:
    """Share of pixels that differ visibly in some channel; both (H, W, 3)."""
    visible = _apart(before, after) > _VISIBLE
    return float((visible[..., 0] | visible[..., 1] | visible[..., 2]).mean())


def ssim(before: Grey, after: Grey) -> float:
    """Mean structural similarity (Wang et al. 2004) of two luma images in [0, 1]."""
    value = structural_similarity(before, after, win_size=SSIM_WINDOW, data_range=1.0)
    return float(value)


def global_shift(before: Grey, after: Grey) -> float:
    """By how much the whole picture has moved, over its longer side; 0 where it has not.

    The shift is that of phase correlation. An edit can have a peak anywhere, so it only counts
    when undoing it removes most of the difference.
    """
    shift, _, _ = phase_cross_correlation(before, after)
    rows, columns = (int(step) for step in shift)
    length = float(np.hypot(rows, columns)) / max(before.shape)
    if not (rows or columns) or max(abs(rows), abs(columns)) >= min(before.shape) // 2:
        return 0.0
    here, there = _overlap(before, rows, columns), _overlap(after, -rows, -columns)
    undone = np.abs(here - there).mean()
    return length if undone < _EXPLAINED * np.abs(before - after).mean() else 0.0


def _within(marks: NDArray[np.bool_], reach: int, join: np.ufunc) -> NDArray[np.bool_]:
    """Any (``np.logical_or``) or all (``np.logical_and``) of the ``reach`` marks around each of
    (H, W), along its row; beyond the ends is nothing that would change the answer.

    Windows are joined to ones of twice their width, in a few steps for the whole picture.
    """
    before = reach // 2
    beyond = ((0, 0), (before, reach - 1 - before))
    joined = np.pad(marks, beyond, constant_values=join.identity)
    width = 1
    while width < reach:
        step = min(width, reach - width)
        joined = join(joined[:, step:], joined[:, :-step])
        width += step
    return joined


def _apart(one: Pixels, other: Pixels) -> Pixels:
    """How far 8-bit levels are from each other, in as many bits."""
    return np.maximum(one, other) - np.minimum(one, other)


def _overlap(luma: Grey, rows: int, columns: int) -> Grey:
    """The part that a picture moved by the opposite still shows."""
    height, width = luma.shape
    return luma[
        max(rows, 0) : height + min(rows, 0),
        max(columns, 0) : width + min(columns, 0),
    ]
