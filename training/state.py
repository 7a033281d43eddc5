"""What is saved so that a run goes on as if nothing had happened.

Weights that learn, optimizer, EMA and the number of steps done. The step stands for the rest:
epoch, place in the data and random numbers are functions of seed, step and salt (see
``dim.learning.batch``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from dim.learning.ema import Ema
from dim.learning.optimizer import OptimizerSettings, make_optimizers, updates_made
from dim.learning.step import Trainable
from dim.learning.trained import trained_weights
from dim.model import DIM
from dim.model.sizes import shapes
from training import parallel
from training.stage import StageConfig

COMPILED_TOKENS = 64  # conditions for compiled blocks have a multiple of so many tokens
COMPILED_TOKENS_OF_SHAPES = 256  # where each length is compiled for each of many shapes

Event = dict[str, float]
"""What happened at ``step``: ``learning_rate`` and ``before``, or ``back_to`` and ``salt``."""


@dataclass
class TrainState:
    """Everything that changes during training. ``step`` is the number of steps done.

    A step whose gradient was no number made no update: ``skipped`` counts them, ``skips_in_a_row``
    the latest ones. ``salt`` counts the times that the run went back. ``events`` are these and
    changes of the learning rate, each with its step.
    """

    module: nn.Module  # unwrapped: its parameter names do not depend on the number of workers
    optimizers: list[torch.optim.Optimizer]
    ema: Ema | None
    step: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    salt: int = 0
    learning_rate: float = 0.0
    events: list[Event] = field(default_factory=list)


def new_state(model: DIM, config: StageConfig, mesh: DeviceMesh | None = None) -> TrainState:
    """The state before the first update; with a ``mesh``, this worker's part of it.

    Raises:
        ConfigError: the optimizer's package is not installed.
    """
    module = _trainable(model, config)
    parallel.shard(module, mesh)
    settings = OptimizerSettings(config.learning_rate, config.betas, config.weight_decay)
    optimizers = make_optimizers(config.optimizer, module, settings)
    ema = None
    if config.ema_decay is not None:
        ema = Ema(module, config.ema_decay, "cpu" if config.ema_on_cpu else None)
    return TrainState(module, optimizers, ema, learning_rate=config.learning_rate)


def _trainable(model: DIM, config: StageConfig) -> Trainable:
    """Connector and painter; the inside of a block is compiled, so before the block is sharded."""
    if not config.compile:
        return Trainable(model)
    if not config.buckets:
        model.painter.compile_blocks()
        return Trainable(model, token_multiple=COMPILED_TOKENS)
    model.painter.compile_blocks(shapes=len(shapes(model.config.sampling.resolution, model.cell)))
    return Trainable(model, token_multiple=COMPILED_TOKENS_OF_SHAPES)


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """Every tensor of the state by name: its own, and not copies.

    Names do not depend on the workers. A packed tensor (of an 8-bit optimizer) is those it consists
    of, each by its own name.
    """
    found: dict[str, Tensor] = {}
    for name, weight in trained_weights(state.module).items():
        found[f"module.{name}"] = weight
    for number, optimizer in enumerate(state.optimizers):
        for place, kept in _kept_by(optimizer).items():
            for name, value in kept.items():
                if isinstance(value, Tensor):
                    found.update(_plain(f"optimizer.{number}.{place}.{name}", value))
    if state.ema is not None:
        for name, average in state.ema.state_dict().items():
            found[f"ema.{name}"] = average
    return found


def values_of(state: TrainState) -> dict[str, Any]:
    """All of the state that is no tensor, as JSON may hold it."""
    return {
        "step": state.step,
        "skipped": state.skipped,
        "skips_in_a_row": state.skips_in_a_row,
        "salt": state.salt,
        "learning_rate": state.learning_rate,
        "events": state.events,
        "optimizers": [
            {
                "groups": [{"step": g["step"]} if "step" in g else {} for g in o.param_groups],
                "parameters": {
                    str(place): {k: v for k, v in kept.items() if not isinstance(v, Tensor)}
                    for place, kept in _kept_by(o).items()
                },
            }
            for o in state.optimizers
        ],
    }


def make_room(state: TrainState, names: Collection[str]) -> dict[str, Tensor]:
    """The tensors of the state, to be filled with those of a checkpoint that has these ``names``.

    An optimizer makes its moments when it makes its first update. So it makes one here, with
    gradients of zero: as large as in training, on the parameters' devices and sharded as they are.
    What it did to the weights is overwritten by what is loaded.
    """
    if not any(optimizer.state for optimizer in state.optimizers):
        for weight in state.module.parameters():
            if weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        for optimizer in state.optimizers:
            optimizer.step()
        state.module.zero_grad()
    for number, optimizer in enumerate(state.optimizers):
        for place, parameter in enumerate(_parameters_of(optimizer)):
            start = f"optimizer.{number}.{place}."
            if not any(name.startswith(start) for name in names):
                optimizer.state.pop(parameter, None)  # it had no gradient so far
    return tensors_of(state)


def take_values(state: TrainState, values: dict[str, Any]) -> None:
    """Give the state what ``values_of`` has told of another one, but for its learning rate.

    Raises:
        KeyError, ValueError: they are not of this program's making.
    """
    for optimizer, told in zip(state.optimizers, values["optimizers"], strict=True):
        for group, saved in zip(optimizer.param_groups, told["groups"], strict=True):
            group.update(saved)
        for place, kept in _kept_by(optimizer).items():
            kept.update(told["parameters"][str(place)])
    state.step, state.salt, state.events = values["step"], values["salt"], values["events"]
    state.skipped, state.skips_in_a_row = values["skipped"], values["skips_in_a_row"]
    if values["learning_rate"] != state.learning_rate:
        changed = {"learning_rate": state.learning_rate, "before": values["learning_rate"]}
        state.events = [*state.events, {"step": state.step} | changed]


def check_updates(state: TrainState, steps: int) -> None:
    """Whether the optimizer has made exactly the updates that were asked for, or skipped them.

    Raises:
        RuntimeError: it has not; the weights are not what the configuration says.
    """
    made, wanted = updates_made(state.optimizers) or {0}, steps - state.skipped
    if made != {wanted}:
        raise RuntimeError(f"{wanted} updates were asked for but {sorted(made)} made")


def _parameters_of(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _kept_by(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """What an optimizer remembers of its parameters, by their place among them."""
    parameters = enumerate(_parameters_of(optimizer))
    return {place: optimizer.state[p] for place, p in parameters if p in optimizer.state}


def _plain(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if isinstance(tensor, DTensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain(f"{name}.{inner}", getattr(tensor, inner))
