"""Weights with NaN or infinity are refused, wherever weights are read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from dim.errors import CheckpointError

# Numbers that are summed at once: the sum as doubles copies them, 8 MB at a time.
PIECE = 1 << 20


def is_finite(tensor: Tensor) -> bool:
    """Whether a floating tensor holds neither NaN nor infinity; needs a few megabytes beside it."""
    # A sum is finite only if every summand is; as a double it cannot overflow.
    pieces = tensor.reshape(-1).split(PIECE)
    return all(bool(piece.sum(dtype=torch.float64).isfinite()) for piece in pieces)


def require_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity, which would paint black squares without a word.

    Raises:
        CheckpointError: names ``where`` and every such tensor.
    """
    refuse_not_finite(where, (name for name, tensor in tensors.items() if not is_finite(tensor)))


def refuse_not_finite(where: str, names: Iterable[str]) -> None:
    """Refuse the tensors ``names``, if there are any, as weights that are not finite.

    Raises:
        CheckpointError: there are.
    """
    if wrong := list(names):
        raise CheckpointError(f"{where}: weights that are not finite: {', '.join(wrong)}")
