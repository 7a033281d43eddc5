"""The frozen autoencoder: pixels to latents and back (diffusers' DC-AE)."""

from __future__ import annotations

import torch
from diffusers import AutoencoderDC
from PIL import Image
from torch import Tensor, nn

from dim.errors import InputError
from dim.model.framing import centre_crop, upright_rgb
from dim.model.pixels import to_pixels
from dim.model.sizes import check_size


class Autoencoder(nn.Module):
    """diffusers' ``AutoencoderDC`` with the latents brought to unit scale.

    The scale is the network's ``scaling_factor`` (0.41407 for SANA 1.1's DC-AE).
    """

    def __init__(self, network: AutoencoderDC) -> None:
        super().__init__()
        self.network = network.requires_grad_(False).eval()

    @property
    def factor(self) -> int:
        """Pixels along each side of a latent cell."""
        return self.network.spatial_compression_ratio

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return self.network.config["latent_channels"]

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents (B, C, H/factor, W/factor) of ``pixels`` (B, 3, H, W) in [-1, 1].

        Raises:
            InputError: the pixels are not (B, 3, H, W), or a side is no multiple of ``factor``.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise InputError(f"pixels must be (B, 3, H, W), not {tuple(pixels.shape)}")
        check_size((pixels.shape[3], pixels.shape[2]), self.factor)
        weight = next(self.network.parameters())
        latent = self.network.encode(pixels.to(weight), return_dict=False)[0]
        return latent * self.network.config["scaling_factor"]

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Pixels (B, 3, H, W), about [-1, 1], of ``latent`` (B, C, h, w)."""
        weight = next(self.network.parameters())
        latent = latent.to(weight) / self.network.config["scaling_factor"]
        return self.network.decode(latent, return_dict=False)[0]

    def prepare(self, image: Image.Image, resolution: int) -> Tensor:
        """``image`` as pixels (3, resolution, resolution), float32 in [-1, 1].

        The shortest side is resized to ``resolution``, then the middle square is cut out.

        Raises:
            InputError: the image cannot be read, or ``resolution`` is no multiple of ``factor``.
        """
        check_size((resolution, resolution), self.factor)
        return to_pixels([centre_crop(upright_rgb(image), (resolution, resolution))])[0]
