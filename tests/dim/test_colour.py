"""Colours in other spaces than sRGB, as a viewer shows them."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageCms

from dim.colour import SRGB_PRIMARIES, matrix_profile, to_srgb, transform_of, video_profile
from tests.image_files import ADOBE_RGB, DISPLAY_P3, printer, screen

LCMS_SRGB = ImageCms.createProfile("sRGB")


def shown(colour: tuple[int, ...], profile: bytes | None, mode: str = "RGB") -> tuple[int, ...]:
    return to_srgb(Image.new(mode, (8, 8), colour), profile).getpixel((3, 3))


def near(one: tuple[int, ...], other: tuple[int, ...]) -> bool:
    return max(abs(a - b) for a, b in zip(one, other, strict=True)) <= 3


@pytest.mark.parametrize(
    ("primaries", "gamma", "stored", "right"),
    [
        (DISPLAY_P3, None, (234, 51, 35), (255, 0, 0)),
        (DISPLAY_P3, None, (117, 251, 76), (0, 255, 0)),
        (ADOBE_RGB, 2.19921875, (219, 0, 0), (255, 0, 0)),
        (ADOBE_RGB, 2.19921875, (144, 255, 60), (0, 255, 0)),
        (SRGB_PRIMARIES, 1.0, (55, 55, 55), (128, 128, 128)),
        (SRGB_PRIMARIES, 1.8, (128, 128, 128), (147, 147, 147)),
    ],
)
def test_screens_are_converted_to_known_colours(
    primaries: tuple[float, ...], gamma: float, stored: tuple[int, ...], right: tuple[int, ...]
) -> None:
    assert near(shown(stored, screen(primaries, gamma)), right)
    for neutral in (0, 255):
        assert near(shown((neutral,) * 3, screen(primaries, gamma)), (neutral,) * 3)


def test_grey_has_profiles_of_its_own() -> None:
    linear = screen(SRGB_PRIMARIES, 1.0, grey=True)
    assert near(shown((55,), linear, "L"), (128, 128, 128))
    assert transform_of(screen(SRGB_PRIMARIES, None, grey=True), "L") is None


def test_inks_go_through_the_table_of_their_printer() -> None:
    profile = printer()
    assert near(shown((0, 0, 0, 0), profile, "CMYK"), (255, 255, 255))
    cyan, by_formula = (shown((255, 0, 0, 0), p, "CMYK") for p in (profile, None))
    assert by_formula == (0, 255, 255)
    assert cyan[0] < 20 and 130 < cyan[1] < 170 and 190 < cyan[2] < 235
    mixed = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 4), np.uint8), "CMYK")
    opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    right = ImageCms.profileToProfile(mixed, opened, LCMS_SRGB, outputMode="RGB")
    assert np.array_equal(np.asarray(to_srgb(mixed, profile)), np.asarray(right))


def test_lab_needs_no_profile() -> None:
    for grey in (0, 128, 255):
        lab = ImageCms.profileToProfile(
            Image.new("RGB", (4, 4), (grey,) * 3),
            LCMS_SRGB,
            ImageCms.createProfile("LAB"),
            outputMode="LAB",
        )
        assert near(to_srgb(lab, None).getpixel((0, 0)), (grey,) * 3)


def test_what_says_srgb_in_its_own_numbers_changes_nothing() -> None:
    for profile in (
        screen(SRGB_PRIMARIES),
        ImageCms.ImageCmsProfile(LCMS_SRGB).tobytes(),
        ImageCms.ImageCmsProfile(LCMS_SRGB).tobytes() + bytes(2 << 20),
    ):
        assert transform_of(profile, "RGB") is None
        assert shown((12, 34, 56), profile) == (12, 34, 56)
    rounded = screen((0.3128, 0.329, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06))
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8))
    opened = ImageCms.ImageCmsProfile(io.BytesIO(rounded))
    off = np.asarray(ImageCms.profileToProfile(image, opened, LCMS_SRGB), int) - np.asarray(image)
    assert 0 < np.abs(off).max() <= 2 and to_srgb(image, rounded).tobytes() == image.tobytes()
    assert transform_of(screen(SRGB_PRIMARIES, 2.2), "RGB") is not None  # near it is not enough


@pytest.mark.parametrize(
    ("profile", "mode"),
    [
        (b"", "RGB"),
        (b"junk" * 99, "RGB"),
        (screen(DISPLAY_P3)[:150], "RGB"),
        (screen(DISPLAY_P3), "L"),
        (screen(DISPLAY_P3), "CMYK"),
        (screen(SRGB_PRIMARIES, 1.0, grey=True), "RGB"),
        (printer(), "RGB"),
    ],
)
def test_a_profile_that_is_broken_or_of_other_colours_is_left(profile: bytes, mode: str) -> None:
    image = Image.new(mode, (8, 8), (90, 40, 200, 10)[: len(mode)] if mode != "L" else 90)
    assert transform_of(profile, mode) is None
    assert to_srgb(image, profile).getpixel((0, 0)) == image.convert("RGB").getpixel((0, 0))


def test_a_transform_is_made_once() -> None:
    profile = screen(DISPLAY_P3, 2.5)
    again = bytes(bytearray(profile))
    assert again is not profile and transform_of(again, "RGB") is transform_of(profile, "RGB")


def test_numbers_that_describe_no_screen_make_no_profile() -> None:
    assert matrix_profile((0.0,) * 8, None, grey=False) is None
    assert matrix_profile((0.3, 0.3) * 4, None, grey=False) is None
    assert matrix_profile(SRGB_PRIMARIES, 1e9, grey=False) is None


def test_colours_as_video_numbers_them() -> None:
    p3 = video_profile(12, 13, grey=False)
    assert near(shown((234, 51, 35), p3), (255, 0, 0))
    assert transform_of(video_profile(1, 13, grey=False), "RGB") is None
    assert video_profile(9, 16, grey=False) is None  # PQ: high dynamic range
    assert video_profile(200, 13, grey=False) is None
