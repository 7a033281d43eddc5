"""What is known of GPUs beforehand: their memory and their speed."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import NamedTuple

from dim.errors import InputError


class Gpu(NamedTuple):
    """A GPU: ``memory`` in bytes, ``flops`` a second of dense bfloat16 matrix products."""

    memory: float
    flops: float


GPUS = {
    "rtx4090": Gpu(24e9, 165e12),
    "a100": Gpu(80e9, 312e12),
    "l40s": Gpu(48e9, 362e12),
    "h100pcie": Gpu(80e9, 756e12),
    "h100": Gpu(80e9, 989e12),
    "h200": Gpu(141e9, 989e12),
    "b200": Gpu(180e9, 2250e12),
}
"""By the makers' data sheets."""


def find_gpu(name: str) -> Gpu:
    """A GPU by name.

    Raises:
        InputError: it is not known.
    """
    if name.lower() not in GPUS:
        raise InputError(f"unknown GPU {name!r}; there are {', '.join(GPUS)}")
    return GPUS[name.lower()]


def named_gpu(device: str) -> Gpu | None:
    """The GPU of the table that a driver calls ``device``, as in ``NVIDIA H100 80GB HBM3``."""
    words = re.split(r"[\s-]+", device.lower())
    names = {*words, *(one + other for one, other in pairwise(words))}
    return next((gpu for name, gpu in GPUS.items() if name in names), None)
