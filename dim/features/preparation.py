"""What decides the hidden states and latents of a sample, besides the sample: the frozen parts.

Features that are kept for later are good as long as their preparation is that of the model that is
to be trained on them. Two preparations are the same exactly when the features are, up to the
rounding of the arithmetic.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from dim.config import StrictModel
from dim.model.autoencoder import Autoencoder
from dim.model.conditioner import Conditioner

_NAMES = {
    "understanding": "the weights of the understanding model",
    "autoencoder": "the weights or the scale of the autoencoder",
    "tokenizer": "the tokenizer or its chat template",
    "image_processor": "the image processor",
    "image_size": "image_size",
    "max_condition_tokens": "max_condition_tokens",
    "resolution": "the resolution",
}


class FrozenParts(Protocol):
    """What has the frozen parts of a DIM, such as a DIM."""

    @property
    def conditioner(self) -> Conditioner: ...

    @property
    def autoencoder(self) -> Autoencoder: ...


class Preparation(StrictModel):
    """The frozen parts as hashes (SHA-256 in hex), and the sizes that images and texts are cut to.

    Weights are hashed as bfloat16: saved in another precision they are still the same. The
    understanding model sees no image of text-to-image samples, so for them ``image_processor`` and
    ``image_size`` are null.
    """

    understanding: str
    autoencoder: str
    tokenizer: str
    image_processor: str | None
    image_size: int | None
    max_condition_tokens: int
    resolution: int

    def differences(self, needed: Preparation) -> list[str]:
        """One phrase for each part of this preparation that is not as in ``needed``."""
        return [
            f"{_NAMES[name]} ({_short(old)} there, {_short(new)} here)"
            for (name, old), (_, new) in zip(self, needed, strict=True)
            if old != new
        ]


def preparation_of(parts: FrozenParts, *, edits: bool, resolution: int) -> Preparation:
    """How ``parts`` prepare samples; reads all their weights once (seconds for 4 billion).

    Args:
        parts: The frozen parts, on any device.
        edits: Whether samples have a source image.
        resolution: Side in pixels of what the autoencoder sees.
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
