"""What is saved so that a run goes on as if nothing had happened.

Weights that learn, optimizer, EMA and the number of steps done. The step stands for the rest:
epoch, place in the data and random numbers are functions of seed, step and salt (see
``dim.learning.batch``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from dim.errors import CheckpointError
from dim.learning.ema import Ema
from dim.learning.optimizer import OptimizerSettings, make_optimizers, updates_made
from dim.learning.step import Trainable
from dim.learning.trained import load_trained_weights, trained_weights
from dim.model import DIM
from dim.model.sizes import shapes
from training import parallel
from training.stage import StageConfig

COMPILED_TOKENS = 64  # conditions for compiled blocks have a multiple of so many tokens
COMPILED_TOKENS_OF_SHAPES = 256  # where each length is compiled for each of many shapes

_FILE = "state.pt"
_VERSION = 2

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


def save(state: TrainState, metrics: Mapping[str, Any], *, rank: int) -> None:
    """Hand the state to Ray Train as a checkpoint, written by rank 0.

    Every worker calls this: sharded tensors are gathered, and Ray Train waits for all of them.
    """
    name = f"step-{state.step:08d}"
    packed = parallel.gathered(_pack(state))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save(packed, Path(folder, _FILE))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        told = {**metrics, "step": state.step}
        ray.train.report(told, checkpoint=checkpoint, checkpoint_dir_name=name)


def restore(state: TrainState, checkpoint: ray.train.Checkpoint | None) -> bool:
    """Load a checkpoint of this run into ``state``; whether there is one.

    Raises:
        CheckpointError: it cannot be read or does not fit the model.
    """
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as folder:
        _unpack(state, Path(folder, _FILE), where=checkpoint.path)
    return True


def return_to(state: TrainState, checkpoint: ray.train.Checkpoint | None) -> bool:
    """Load a checkpoint of this run to go on from it with other draws; whether there is one.

    Raises:
        CheckpointError: as for ``restore``.
    """
    left, salt, events = state.step, state.salt + 1, state.events
    if not restore(state, checkpoint):
        return False
    state.salt = salt  # not the checkpoint's own: going back twice would meet the same draws twice
    state.events = [*events, {"step": left, "back_to": state.step, "salt": salt}]
    return True


def check_updates(state: TrainState, steps: int) -> None:
    """Whether the optimizer has made exactly the updates that were asked for, or skipped them.

    Raises:
        RuntimeError: it has not; the weights are not what the configuration says.
    """
    made, wanted = updates_made(state.optimizers) or {0}, steps - state.skipped
    if made != {wanted}:
        raise RuntimeError(f"{wanted} updates were asked for but {sorted(made)} made")


def _pack(state: TrainState) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "step": state.step,
        "skipped": state.skipped,
        "skips_in_a_row": state.skips_in_a_row,
        "salt": state.salt,
        "learning_rate": state.learning_rate,
        "events": state.events,
        "module": trained_weights(state.module),
        "optimizers": [optimizer.state_dict() for optimizer in state.optimizers],
        "ema": None if state.ema is None else state.ema.state_dict(),
    }


def _unpack(state: TrainState, path: Path, *, where: str) -> None:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {where} cannot be read: {error}") from error
    if saved["version"] != _VERSION:
        raise CheckpointError(
            f"the checkpoint {where} has format {saved['version']}, this program reads {_VERSION}"
        )
    try:
        _load_weights(state.module, saved["module"])
        for optimizer, its in zip(state.optimizers, saved["optimizers"], strict=True):
            _load_optimizer(optimizer, its)
        if state.ema is not None:
            state.ema.load_state_dict(_parts_of(saved["ema"], state.ema.state_dict()))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the checkpoint {where} does not fit the model: {reason}") from error
    state.step, state.salt, state.events = saved["step"], saved["salt"], saved["events"]
    state.skipped, state.skips_in_a_row = saved["skipped"], saved["skips_in_a_row"]
    if saved["learning_rate"] != state.learning_rate:
        changed = {"learning_rate": state.learning_rate, "before": saved["learning_rate"]}
        state.events = [*state.events, {"step": state.step} | changed]


def _load_weights(module: nn.Module, saved: dict[str, torch.Tensor]) -> None:
    load_trained_weights(module, _parts_of(saved, trained_weights(module)))


def _parts_of(
    saved: dict[str, torch.Tensor], current: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """This worker's parts of whole tensors: as what is there now is sharded."""
    return {name: parallel.part_of(tensor, current.get(name)) for name, tensor in saved.items()}


def _load_optimizer(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """What is as large as its parameter is sharded as that is."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = {
        number: {
            name: parallel.part_of(value, parameters[number])
            if isinstance(value, torch.Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in kept.items()
        }
        for number, kept in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": states})
