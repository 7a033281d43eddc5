from __future__ import annotations

import numpy as np
import pytest
from diffusers.image_processor import PixArtImageProcessor
from diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha import (
    ASPECT_RATIO_512_BIN,
    ASPECT_RATIO_1024_BIN,
)

from dim.errors import InputError
from dim.model.sizes import check_size, nearest_shape, shapes


@pytest.mark.parametrize(
    ("resolution", "table"), [(1024, ASPECT_RATIO_1024_BIN), (512, ASPECT_RATIO_512_BIN)]
)
def test_sana_s_own_sizes_are_painted_at_its_resolutions(resolution, table):
    ours = shapes(resolution, 32)
    assert ours == {float(r): (int(w), int(h)) for r, (h, w) in table.items()}
    for size in ((1000, 1000), (4032, 3024), (300, 900), (77, 301), (20, 2000), (2000, 20)):
        width, height = size
        theirs = PixArtImageProcessor.classify_height_width_bin(height, width, table)
        assert nearest_shape(size, resolution, 32) == (theirs[1], theirs[0])


def test_other_resolutions_have_the_same_shapes_in_whole_cells():
    sizes = shapes(64, 16)
    assert sizes[1.0] == (64, 64) and sizes[0.25] == (128, 32) and sizes[4.0] == (32, 128)
    assert all(side % 16 == 0 and side >= 16 for size in sizes.values() for side in size)
    assert min(side for size in shapes(16, 16).values() for side in size) == 16


@pytest.mark.parametrize("size", [(65, 64), (64, 0), (-64, 64)])
def test_sizes_that_do_not_divide_are_refused(size):
    with pytest.raises(InputError, match="does not divide into cells of 16x16"):
        check_size(size, 16)
    check_size((32, 16), 16)


def test_how_much_of_a_picture_does_not_fit_its_shape() -> None:
    """The share of a side that is cut off in training, and by which ``fit: source`` stretches."""
    lost = {}
    for ratio in np.linspace(0.25, 4, 5000):
        width, height = nearest_shape((1_000_000, round(1_000_000 * ratio)), 1024, 32)
        apart = height / width / ratio
        lost[ratio] = 1 - min(apart, 1 / apart)
    assert max(lost.values()) < 0.145
    assert max(share for ratio, share in lost.items() if not 3 < ratio < 4) < 0.1
    assert np.mean(list(lost.values())) < 0.05
