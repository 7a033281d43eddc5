"""The sizes that are painted: SANA's shapes of about one area, and what divides into cells."""

from __future__ import annotations

from functools import lru_cache

from dim.errors import InputError

Size = tuple[int, int]
"""(width, height) in pixels."""

TABLE_RESOLUTION = 1024
# (height, width) of diffusers' ASPECT_RATIO_1024_BIN, whose import brings all models with it:
# seconds that a server's entry would spend in the middle of its first request.
_TABLE = (
    (512, 2048), (512, 1856), (576, 1792), (576, 1728), (576, 1664), (640, 1600), (640, 1536),
    (704, 1472), (704, 1408), (704, 1344), (768, 1344), (768, 1280), (832, 1216), (832, 1152),
    (896, 1152), (896, 1088), (960, 1088), (960, 1024), (1024, 1024), (1024, 960), (1088, 960),
    (1088, 896), (1152, 896), (1152, 832), (1216, 832), (1280, 768), (1344, 768), (1408, 704),
    (1472, 704), (1536, 640), (1600, 640), (1728, 576), (2048, 512),
)  # fmt: skip


@lru_cache
def shapes(resolution: int, cell: int) -> dict[float, Size]:
    """The sizes a model of ``resolution`` paints, by their height / width from 1/4 to 4.

    At 1024 these are diffusers' ``ASPECT_RATIO_1024_BIN``, at 512 its ``ASPECT_RATIO_512_BIN``; at
    other resolutions the same shapes, each side rounded to a multiple of ``cell`` pixels.
    """
    scale = resolution / TABLE_RESOLUTION / cell

    def side(pixels: float) -> int:
        return max(1, round(pixels * scale)) * cell

    return {round(height / width, 2): (side(width), side(height)) for height, width in _TABLE}


def nearest_shape(size: Size, resolution: int, cell: int) -> Size:
    """Of ``shapes`` the one whose height / width is nearest to that of ``size``, as SANA picks."""
    ratio = size[1] / size[0]
    table = shapes(resolution, cell)
    return table[min(table, key=lambda known: abs(known - ratio))]


def check_size(size: Size, cell: int) -> None:
    """Refuse a size that does not divide into cells of ``cell`` pixels.

    Raises:
        InputError: a side is no positive multiple of ``cell``.
    """
    if any(side < 1 or side % cell for side in size):
        raise InputError(
            f"an image of {size[0]}x{size[1]} does not divide into cells of {cell}x{cell} pixels"
        )
