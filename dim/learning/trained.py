"""The weights of a module that learn: all that a checkpoint has to hold.

What is frozen comes from where the stage begins, and would make an adapter's checkpoint as large as
the model.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def trained_weights(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of ``module`` with gradients, by name; not copies."""
    return {
        name: parameter.detach()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def load_trained_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` into ``module``.

    Raises:
        KeyError: they are not those that learn; the message names one.
        RuntimeError: one has another shape.
    """
    trained = trained_weights(module)
    if differing := sorted(trained.keys() ^ weights.keys()):
        raise KeyError(differing[0])
    for name, parameter in trained.items():
        if parameter.shape != weights[name].shape:
            raise RuntimeError(
                f"{name} is {tuple(weights[name].shape)}, not {tuple(parameter.shape)}"
            )
        parameter.copy_(weights[name])
