"""The optimizer of a stage, and how many updates it has made."""

from __future__ import annotations

from torch import nn
from torch.optim import AdamW, Optimizer


def adamw(
    module: nn.Module, *, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> Optimizer:
    """AdamW over all parameters of ``module`` that learn, each update in one fused pass."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return AdamW(learning, lr=learning_rate, betas=betas, weight_decay=weight_decay, fused=True)


def updates_made(optimizer: Optimizer) -> set[int]:
    """How many updates the parameters have had: one number, unless some were left out.

    Raises:
        KeyError: an optimizer that does not count them, as AdamW does.
    """
    return {int(state["step"]) for state in optimizer.state.values()}
