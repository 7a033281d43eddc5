"""Hidden states and latents as bytes and back: bfloat16 exactly, or 8 bits with a scale a token."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor

Encoding = Literal["bf16", "int8"]
"""How hidden states are kept. Latents are small and always bfloat16."""

_LEVELS = 127  # symmetric: -127 to 127, so that zero stays zero


def pack_bf16(tensor: Tensor) -> bytes:
    """``tensor`` rounded to bfloat16, two bytes a number, little-endian, last axis fastest."""
    return tensor.to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes()


def unpack_bf16(data: bytes, shape: tuple[int, ...]) -> Tensor:
    """The bfloat16 tensor of ``shape`` that ``pack_bf16`` wrote.

    Raises:
        ValueError: ``data`` is not as long as ``shape`` asks for.
    """
    # A copy, since bytes may not be written to and torch wants to be able to.
    numbers = np.frombuffer(data, np.dtype("<i2")).reshape(shape).copy()
    return torch.from_numpy(numbers).view(torch.bfloat16)


def pack_int8(states: Tensor) -> tuple[bytes, bytes]:
    """Hidden states (N, H) in 8 bits a number: the numbers, and a float32 scale a token.

    A token's scale is its largest absolute value over 127, so each number is off by half a scale
    at most.
    """
    states = states.to("cpu", torch.float32)
    scales = states.abs().amax(dim=1) / _LEVELS
    scales = torch.where(scales > 0, scales, 1.0)
    numbers = torch.round(states / scales[:, None]).to(torch.int8)
    return numbers.numpy().tobytes(), scales.numpy().tobytes()


def unpack_int8(data: bytes, scales: bytes, shape: tuple[int, int]) -> Tensor:
    """The float32 hidden states of ``shape`` (N, H) that ``pack_int8`` wrote.

    Raises:
        ValueError: ``data`` or ``scales`` are not as long as ``shape`` asks for.
    """
    numbers = np.frombuffer(data, np.int8).reshape(shape).astype(np.float32)
    return torch.from_numpy(numbers * np.frombuffer(scales, np.dtype("<f4")).reshape(shape[0], 1))


def relative_error(states: Tensor, kept: Tensor) -> float:
    """The root mean square of what ``kept`` differs by, over that of ``states``."""
    states = states.to("cpu", torch.float32)
    return float((kept.float() - states).norm() / states.norm().clamp_min(1e-12))
