"""What kept features are: numbers as bytes, and what decided them besides the sample.

Hidden states and latents are bfloat16 exactly, or hidden states have 8 bits with a scale a token.
They are good as long as their preparation is that of the model that is to be trained on them. Two
preparations are the same exactly when the features are, up to the rounding of the arithmetic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Literal, Protocol

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from dim.config import StrictModel
from dim.model.autoencoder import Autoencoder
from dim.model.conditioner import Conditioner
from dim.model.config import VlmView

Encoding = Literal["bf16", "int8"]
"""How hidden states are kept. Latents are small and always bfloat16."""

_LEVELS = 127  # symmetric: -127 to 127, so that zero stays zero
_NAMES = {
    "understanding": "the weights of the understanding model",
    "autoencoder": "the weights or the scale of the autoencoder",
    "tokenizer": "the tokenizer or its chat template",
    "image_processor": "the image processor",
    "image_size": "image_size",
    "max_condition_tokens": "max_condition_tokens",
    "resolution": "the resolution",
    "cell": "the cells of the shapes (buckets)",
    "vlm_view": "what the understanding model sees (vlm_view)",
}


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


class FrozenParts(Protocol):
    """What has the frozen parts of a DIM, such as a DIM."""

    @property
    def conditioner(self) -> Conditioner: ...

    @property
    def autoencoder(self) -> Autoencoder: ...

    @property
    def cell(self) -> int: ...


class Preparation(StrictModel):
    """The frozen parts as hashes (SHA-256 in hex), and the sizes that images and texts are cut to.

    Weights are hashed as bfloat16: saved in another precision they are still the same. The
    understanding model sees no image of text-to-image samples, so for them ``image_processor`` and
    ``image_size`` are null.

    ``cell``: samples are cut to SANA's shapes, in cells of so many pixels; null: to squares.
    ``vlm_view``: see ``StageInputs``. Left out where they are as published, so that what was
    written before there were such is still what it was.
    """

    understanding: str
    autoencoder: str
    tokenizer: str
    image_processor: str | None
    image_size: int | None
    max_condition_tokens: int
    resolution: int
    cell: int | None = Field(None, exclude_if=lambda cell: cell is None)
    vlm_view: VlmView = Field("whole", exclude_if=lambda view: view == "whole")

    def differences(self, needed: Preparation) -> list[str]:
        """One phrase for each part of this preparation that is not as in ``needed``."""
        return [
            f"{_NAMES[name]} ({_short(old)} there, {_short(new)} here)"
            for (name, old), (_, new) in zip(self, needed, strict=True)
            if old != new
        ]


def preparation_of(
    parts: FrozenParts,
    *,
    edits: bool,
    resolution: int,
    buckets: bool = False,
    vlm_view: VlmView = "whole",
) -> Preparation:
    """How ``parts`` prepare samples; reads all their weights once (seconds for 4 billion).

    Args:
        parts: The frozen parts, on any device.
        edits: Whether samples have a source image.
        resolution: Side in pixels of what the autoencoder sees.
        buckets, vlm_view: See ``StageInputs``.
    """
    conditioner, network = parts.conditioner, parts.autoencoder.network
    tokenizer = conditioner.tokenizer
    scale = torch.tensor([network.config["scaling_factor"]])
    processor = conditioner.image_processor.to_dict()
    return Preparation(
        understanding=_hash(_weights(conditioner.model.model.state_dict())),
        autoencoder=_hash([*_weights(network.state_dict()), scale.numpy().tobytes()]),
        tokenizer=_hash(
            [tokenizer.backend_tokenizer.to_str().encode(), *conditioner.chat.frames()]
        ),
        image_processor=_hash([json.dumps(processor, sort_keys=True).encode()]) if edits else None,
        image_size=conditioner.image_size if edits else None,
        max_condition_tokens=conditioner.max_condition_tokens,
        resolution=resolution,
        cell=parts.cell if buckets else None,
        vlm_view=vlm_view if edits else "whole",
    )


def _weights(state: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """Names, shapes and values of tensors, in order of name."""
    for name in sorted(state):
        tensor = state[name]
        yield f"{name} {tuple(tensor.shape)}\n".encode()
        if tensor.is_floating_point():
            tensor = tensor.to(torch.bfloat16)
        yield tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data


def _hash(parts: Iterable[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def _short(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)
