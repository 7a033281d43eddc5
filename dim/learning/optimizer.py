"""The optimizers that a stage may choose from, their learning rate, and their count of updates.

A stage has a list of them, because Muon is for matrices only and AdamW takes the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from dim.errors import ConfigError

OptimizerName = Literal["adamw", "adamw8bit", "muon"]

# What an optimizer remembers of a parameter; of Muon's the few that AdamW trains have 8.
MOMENT_BYTES: dict[OptimizerName, int] = {"adamw": 8, "adamw8bit": 2, "muon": 4}

# Where a class AdamW8bit may come from, the better one first: torchao's is plain PyTorch.
_EIGHT_BIT = ("torchao.optim", "bitsandbytes.optim")
# The first and the last layer, whose one side is the latent's channels: Muon is for hidden ones.
_OUTER_LAYERS = ("patch_embed", "proj_out")


class OptimizerSettings(NamedTuple):
    """What all optimizers are told."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float


def make_optimizers(
    name: OptimizerName, module: nn.Module, settings: OptimizerSettings
) -> list[Optimizer]:
    """The optimizers that together train every parameter of ``module`` that wants a gradient.

    ``adamw``: each update in one fused pass. ``adamw8bit``: its two moments in 8 bits, a quarter of
    the memory. ``muon``: Muon for the weights of hidden linear layers and 1×1 convolutions, AdamW
    for all others; Muon's steps are scaled to AdamW's size, so both have one learning rate.

    Raises:
        ConfigError: the package it needs is not installed.
    """
    return OPTIMIZERS[name](module, settings)


def set_learning_rate(optimizers: Sequence[Optimizer], rate: float) -> None:
    """The rate of the next update."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):  # torchao's, whose step is compiled
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


def updates_made(optimizers: Sequence[Optimizer]) -> set[int]:
    """How many updates the parameters have had: one number, unless some were left out."""
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return {int(kept["step"]) for kept in (*groups, *states) if "step" in kept}


def _adamw(module: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    return [_fused([p for p in module.parameters() if p.requires_grad], settings)]


def _adamw8bit(module: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    parameters = [p for p in module.parameters() if p.requires_grad]
    return [_eight_bit_class()(parameters, **_named(settings))]


def _muon(module: nn.Module, settings: OptimizerSettings) -> list[Optimizer]:
    matrices = list(_matrices(module))
    taken = {id(weight) for weight in matrices}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in taken]
    if not matrices:
        return [_fused(rest, settings)]
    # A 1×1 convolution's weight as the matrix that it is: a view, which has no gradient itself.
    flat = [weight.detach().flatten(1) if weight.ndim > 2 else weight for weight in matrices]
    muon = Muon(
        flat,
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )

    def lend_gradients(optimizer: Optimizer, *_: Any) -> None:
        for matrix, weight in zip(flat, matrices, strict=True):
            if matrix is not weight:
                matrix.grad = None if weight.grad is None else weight.grad.flatten(1)

    def count(optimizer: Optimizer, *_: Any) -> None:
        for matrix, weight in zip(flat, matrices, strict=True):
            if matrix is not weight:
                matrix.grad = None
        for group in optimizer.param_groups:  # Muon's own states count nothing
            group["step"] = group.get("step", 0) + 1

    muon.register_step_pre_hook(lend_gradients)
    muon.register_step_post_hook(count)
    return [muon, _fused(rest, settings)] if rest else [muon]


OPTIMIZERS: dict[OptimizerName, Callable[[nn.Module, OptimizerSettings], list[Optimizer]]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "muon": _muon,
}


def _fused(parameters: list[nn.Parameter], settings: OptimizerSettings) -> Optimizer:
    return AdamW(parameters, **_named(settings), fused=True)


def _named(settings: OptimizerSettings) -> dict[str, Any]:
    return {
        "lr": settings.learning_rate,
        "betas": settings.betas,
        "weight_decay": settings.weight_decay,
    }


def _matrices(module: nn.Module) -> Iterator[torch.Tensor]:
    """The weights of hidden linear layers and 1×1 convolutions; tables and depthwise ones not."""
    for name, part in module.named_modules():
        if not isinstance(part, nn.Linear | nn.Conv2d) or not part.weight.requires_grad:
            continue
        if any(outer in name.split(".") for outer in _OUTER_LAYERS):
            continue
        if isinstance(part, nn.Linear) or (part.kernel_size == (1, 1) and part.groups == 1):
            yield part.weight


def _eight_bit_class() -> Callable[..., Optimizer]:
    for name in _EIGHT_BIT:
        try:
            found: Callable[..., Optimizer] = importlib.import_module(name).AdamW8bit
        except ImportError:
            continue
        return found
    raise ConfigError(
        "optimizer adamw8bit needs torchao or bitsandbytes, and neither is installed where the "
        "workers run: pip install torchao, or choose optimizer: adamw"
    )
