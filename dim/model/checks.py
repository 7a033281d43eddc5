"""What is checked of trained weights wherever they come from."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dim.errors import CheckpointError


def require_finite(where: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with NaN or infinity, which would paint black squares without a word.

    Raises:
        CheckpointError: names ``where`` and every such tensor.
    """
    # A sum is finite only if every summand is; as a double it cannot overflow, and needs no copy.
    wrong = [
        name for name, tensor in tensors.items() if not tensor.sum(dtype=torch.float64).isfinite()
    ]
    if wrong:
        raise CheckpointError(f"{where}: weights that are not finite: {', '.join(wrong)}")
