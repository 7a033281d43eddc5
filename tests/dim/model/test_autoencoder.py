from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from dim.errors import InputError
from dim.model.framing import centre_crop, upright_rgb
from dim.model.pixels import to_images, to_pixels


def test_pixels_become_cells_and_come_back_in_shape(tiny):
    pixels = torch.rand(2, 3, 32, 64) * 2 - 1
    latent = tiny.autoencoder.encode(pixels)
    assert latent.shape == (2, 8, 4, 8) and not latent.requires_grad
    assert tiny.autoencoder.decode(latent).shape == pixels.shape


def test_latents_are_scaled_by_the_networks_factor(tiny, monkeypatch):
    pixels = torch.rand(1, 3, 32, 32)
    plain = tiny.autoencoder.encode(pixels)
    decoded = tiny.autoencoder.decode(plain)
    config = {**tiny.autoencoder.network.config, "scaling_factor": 0.5}
    monkeypatch.setattr(type(tiny.autoencoder.network), "config", config)
    torch.testing.assert_close(tiny.autoencoder.encode(pixels), plain * 0.5)
    torch.testing.assert_close(tiny.autoencoder.decode(plain * 0.5), decoded)


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 3, 0, 32), (3, 32, 32), (1, 4, 32, 32)])
def test_pixels_that_do_not_divide_into_cells_are_refused(tiny, shape):
    with pytest.raises(InputError):
        tiny.autoencoder.encode(torch.zeros(shape))


def test_images_are_cut_to_their_middle_square(tiny):
    image = Image.new("RGB", (96, 32), "red")
    image.paste("blue", (32, 0, 64, 32))
    pixels = tiny.autoencoder.prepare(image, 64)
    assert pixels.shape == (3, 64, 64) and pixels.dtype == torch.float32
    assert torch.equal(pixels[:, 32, 32], torch.tensor([-1.0, -1.0, 1.0]))
    assert centre_crop(Image.new("RGB", (1000, 37)), (64, 64)).size == (64, 64)
    with pytest.raises(InputError, match="does not divide"):
        tiny.autoencoder.prepare(image, 60)


def test_images_survive_the_way_to_pixels_and_back(photos):
    square = centre_crop(photos[3], (64, 64))
    assert np.array_equal(np.asarray(to_images(to_pixels([square]))[0]), np.asarray(square))
    assert np.asarray(to_images(torch.full((1, 3, 2, 2), 9.0))[0]).min() == 255


def test_images_of_every_kind_become_upright_rgb():
    clear = Image.new("RGBA", (20, 10), (255, 0, 0, 0))
    assert upright_rgb(clear).getpixel((3, 3)) == (255, 255, 255)
    deep = Image.fromarray(np.full((10, 20), 0x8000, dtype=np.uint16))
    assert upright_rgb(deep).getpixel((3, 3)) == (128, 128, 128)
    assert upright_rgb(Image.new("CMYK", (20, 10), (0, 255, 255, 0))).getpixel((0, 0)) == (
        255,
        0,
        0,
    )
    assert upright_rgb(Image.new("L", (20, 10), 7)).getpixel((0, 0)) == (7, 7, 7)
    turned = Image.new("RGB", (20, 10))
    turned.getexif()[0x0112] = 6
    assert upright_rgb(turned).size == (10, 20)
    palette = Image.new("P", (20, 10))
    assert upright_rgb(palette).mode == "RGB"


def test_images_without_a_meaning_are_refused(tmp_path):
    for image in (Image.new("F", (20, 10)), Image.new("RGB", (1, 1)), "cat.png", None):
        with pytest.raises(InputError, match="image 2"):
            upright_rgb(image, "image 2")
    Image.new("RGB", (90, 90), "red").save(tmp_path / "a.png")
    broken = (tmp_path / "a.png").read_bytes()[:60]
    (tmp_path / "a.png").write_bytes(broken)
    with pytest.raises(InputError, match="cannot be read"):
        upright_rgb(Image.open(tmp_path / "a.png"))
