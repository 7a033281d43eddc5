"""Weights of 8 bits, by torchao, which is an optional package."""

from __future__ import annotations

from typing import Any

from torch import nn

from dim.errors import InputError


def quantize(module: nn.Module) -> None:
    """Keep the weights of every linear layer in ``module`` as int8, a scale a row, in place.

    What goes in and comes out keeps its type: the weights are brought back as they are used.

    Raises:
        InputError: ``torchao`` is not installed.
    """
    quantization = load_torchao()
    quantization.quantize_(module, quantization.Int8WeightOnlyConfig())


def load_torchao() -> Any:
    """``torchao.quantization``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import torchao.quantization
    except ImportError:
        raise InputError("weights of 8 bits need torchao: pip install 'dim[int8]'") from None
    return torchao.quantization
