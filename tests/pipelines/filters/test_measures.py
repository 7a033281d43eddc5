from __future__ import annotations

import io

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont
from scipy import ndimage

from pipelines.filters import measures
from tests.pipelines.samples import encoded, photo


def distance(first: Image.Image, second: Image.Image) -> int:
    return (measures.perceptual_hash(first) ^ measures.perceptual_hash(second)).bit_count()


def test_the_hash_survives_what_does_not_change_a_picture() -> None:
    image = photo(1, (512, 384))
    jpeg = Image.open(io.BytesIO(encoded(image, "JPEG", quality=40)))
    assert distance(image, jpeg) <= 4
    assert distance(image, image.resize((200, 150))) <= 4
    assert distance(image, ImageEnhance.Brightness(image).enhance(0.9)) <= 4
    others = [photo(seed, (512, 384)) for seed in range(2, 30)]
    assert min(distance(image, other) for other in others) > 12
    assert distance(image, image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) > 12


def test_flat_pictures_have_one_hash() -> None:
    flat = [Image.new("RGB", (97, 61), colour) for colour in ("white", "black", "teal")]
    assert {measures.perceptual_hash(image) for image in flat} == {0}


def test_entropy_counts_grey_levels() -> None:
    halves = Image.new("L", (64, 64))
    halves.paste(255, (0, 0, 32, 64))
    assert measures.entropy(halves) == pytest.approx(1.0)
    assert measures.entropy(Image.new("L", (300, 20), 7)) == 0.0


def test_blur_lowers_sharpness() -> None:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (128, 128, 3), dtype=np.uint8))
    sharp, soft = (
        measures.sharpness(measures.levels(each))
        for each in (image, image.filter(ImageFilter.GaussianBlur(3)))
    )
    assert sharp > 100 * soft > 0


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    for seed, size in ((1, (61, 40)), (2, (8, 9)), (3, (300, 301))):
        luma = measures.levels(photo(seed, size))
        wanted = ndimage.laplace(luma.astype(np.float64) / 255).var()
        assert measures.sharpness(luma) == pytest.approx(wanted, rel=1e-12)
    assert measures.sharpness(np.full((16, 16), 200, np.uint8)) == 0.0


def test_text_is_told_from_shapes() -> None:
    plain = photo(2, (400, 400))
    shapes, words = plain.copy(), plain.copy()
    for place in range(20, 360, 60):
        ImageDraw.Draw(shapes).ellipse((place, place, place + 50, place + 40), fill="white")
    for top in range(10, 380, 30):
        line = "Stock photograph, not for sale or for training"
        ImageDraw.Draw(words).text((10, top), line, "white", ImageFont.load_default(17))
    areas = [measures.text_area(measures.levels(image)) for image in (plain, shapes, words)]
    assert areas[0] == 0.0 and areas[1] < 0.02 and areas[2] > 0.15


def test_text_lines_are_joined_as_a_morphological_closing_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pictures = []
    for side in (9, 150, 400, 611):  # of odd and even reach, and lines at both ends
        image = Image.new("L", (side, side), "black")
        for top in range(0, side, 23):
            line = "Not for sale or for training " * 3
            ImageDraw.Draw(image).text((top - 40, top), line, "white", ImageFont.load_default(17))
        pictures.append(measures.levels(image))
    areas = [measures.text_area(luma) for luma in pictures]
    assert max(areas) > 0.15
    walks = {np.logical_or: ndimage.maximum_filter1d, np.logical_and: ndimage.minimum_filter1d}

    def walked(marks: NDArray[np.bool_], reach: int, join: np.ufunc) -> NDArray[np.bool_]:
        return np.asarray(walks[join](marks.view(np.uint8), reach, axis=1), np.bool_)

    monkeypatch.setattr(measures, "_within", walked)
    assert areas == [measures.text_area(luma) for luma in pictures]


def test_scaling_by_whole_steps_is_the_same_mean() -> None:
    image = photo(3, (96, 60))
    by_steps = np.asarray(measures.resized(image, (32, 20)), np.int16)
    wanted = np.asarray(image, np.float64).reshape(20, 3, 32, 3, 3).mean((1, 3))
    assert abs(by_steps - wanted).max() < 1  # it rounds to 8 bits


@pytest.mark.parametrize(("rows", "columns"), [(0, 9), (-12, 0), (6, -7)])
def test_a_shift_is_found(rows: int, columns: int) -> None:
    world = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 50), dtype=np.uint8))
    luma = measures.grey(world.resize((300, 300), Image.Resampling.BICUBIC))
    before = luma[40:240, 40:240]
    after = luma[40 - rows : 240 - rows, 40 - columns : 240 - columns]
    assert measures.global_shift(before, after) == pytest.approx(np.hypot(rows, columns) / 200)


def test_an_edit_is_no_shift() -> None:
    before = measures.grey(photo(3, (200, 150)))
    after = before.copy()
    after[30:90, 40:110] = 1.0
    assert measures.global_shift(before, after) == 0.0
    assert measures.global_shift(before, measures.grey(photo(4, (200, 150)))) == 0.0
    assert measures.global_shift(before, before) == 0.0


def test_scaling_keeps_small_pictures_and_shapes() -> None:
    assert measures.scaled(photo(0, (64, 48)), 64).size == (64, 48)
    assert measures.scaled(photo(0, (1000, 3)), 100).size == (100, 1)
    before, after = measures.at_common_size(photo(0, (900, 30)), photo(0, (30, 900)), 90)
    assert before.size == after.size == (90, measures.SSIM_WINDOW)
