"""A thousand masks as clients draw them: what they leave out is the source's, bit for bit."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageDraw

from dim.images import encode_png
from serving.encoding import Output
from serving.errors import BadRequestError
from serving.painter import decode_mask, file_of
from serving.sources import KEPT_FROM, read_mask

MASKS = 1000
LOSSLESS = (Output("png"), Output("webp"))


def some_alpha(rng: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Noise of every alpha, a soft brush, a hard shape, a single pixel, nearly everything."""
    kind = rng.integers(5)
    if kind == 0:
        return rng.integers(0, 256, (height, width), dtype=np.uint8)
    if kind == 1:
        down, across = np.mgrid[:height, :width]
        distance = np.hypot(across - rng.uniform(0, width), down - rng.uniform(0, height))
        return np.clip(distance * rng.uniform(5, 60), 0, 255).astype(np.uint8)
    drawn = Image.new("L", (width, height), 255)
    if kind == 2:
        across, down = (sorted(rng.integers(0, side, 2).tolist()) for side in (width, height))
        ImageDraw.Draw(drawn).ellipse((across[0], down[0], across[1], down[1]), fill=0)
    alpha = np.array(drawn) if kind < 4 else np.zeros((height, width), np.uint8)
    alpha[rng.integers(height), rng.integers(width)] = 0 if kind < 4 else 255
    return alpha


def some_mask(rng: np.random.Generator, alpha: np.ndarray) -> bytes:
    """A client's file of that alpha: colours under it are anything."""
    colours = rng.integers(0, 256, (*alpha.shape, 3), dtype=np.uint8)
    mask = Image.fromarray(np.dstack([colours, alpha]))
    if rng.random() < 0.7:
        return encode_png(mask)
    buffer = io.BytesIO()
    mask.save(buffer, format="WEBP", lossless=True)
    return buffer.getvalue()


@pytest.mark.parametrize("seed", range(4))
def test_no_pixel_outside_of_a_mask_changes(seed: int) -> None:
    rng = np.random.default_rng(seed)
    for number in range(MASKS // 4):
        width, height = (int(side) for side in rng.integers(8, 60, 2))
        alpha = some_alpha(rng, width, height)
        data = some_mask(rng, alpha)
        if alpha.min() >= KEPT_FROM:
            with pytest.raises(BadRequestError, match="no transparent pixel"):
                read_mask(data, (width, height))
            continue
        source, painted = rng.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        mask = decode_mask(read_mask(data, (width, height)))
        file = file_of(
            Image.fromarray(painted),
            output=LOSSLESS[number % 2],
            source=Image.fromarray(source),
            mask=mask,
        )
        given = np.asarray(Image.open(io.BytesIO(file)).convert("RGB"))
        kept = alpha >= KEPT_FROM
        assert np.count_nonzero(given[kept] != source[kept]) == 0, (seed, number)
        assert np.array_equal(given[~kept], painted[~kept]), (seed, number)
