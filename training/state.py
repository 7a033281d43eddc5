"""What is saved so that a run goes on as if nothing had happened.

Weights that learn, optimizer, EMA and the number of updates done. The step stands for the rest:
epoch, place in the data and random numbers are functions of seed and step (see
``dim.learning.batch``).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import torch
from torch import nn

from dim.errors import CheckpointError
from dim.learning.ema import Ema
from dim.learning.optimizer import adamw, updates_made
from dim.learning.step import Trainable
from dim.learning.trained import load_trained_weights, trained_weights
from dim.model import DIM
from training.stage import StageConfig

_FILE = "state.pt"
_VERSION = 1


@dataclass
class TrainState:
    """Everything that changes during training. ``step`` is the number of updates done."""

    module: nn.Module  # unwrapped: its parameter names do not depend on the number of workers
    optimizer: torch.optim.Optimizer
    ema: Ema | None
    step: int = 0


def new_state(model: DIM, config: StageConfig) -> TrainState:
    """The state before the first update."""
    module = Trainable(model)
    optimizer = adamw(
        module,
        learning_rate=config.learning_rate,
        betas=config.betas,
        weight_decay=config.weight_decay,
    )
    ema = None if config.ema_decay is None else Ema(module, config.ema_decay)
    return TrainState(module, optimizer, ema)


def save(state: TrainState, metrics: Mapping[str, Any], *, rank: int) -> None:
    """Hand the state to Ray Train as a checkpoint, written by rank 0.

    Every worker calls this: Ray Train waits for all of them.
    """
    name = f"step-{state.step:08d}"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if rank == 0:
            torch.save(_pack(state), Path(folder, _FILE))
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        told = {**metrics, "step": state.step}
        ray.train.report(told, checkpoint=checkpoint, checkpoint_dir_name=name)


def restore(state: TrainState, device: torch.device) -> bool:
    """Load the latest checkpoint of this run into ``state``; whether there was one.

    Raises:
        CheckpointError: it cannot be read or does not fit the model.
    """
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return False
    with checkpoint.as_directory() as folder:
        _unpack(state, Path(folder, _FILE), device, where=checkpoint.path)
    return True


def check_updates(state: TrainState, steps: int) -> None:
    """Whether the optimizer has made exactly the updates that were asked for.

    Raises:
        RuntimeError: it has not; the weights are not what the configuration says.
    """
    made = updates_made(state.optimizer)
    if made != {steps}:
        raise RuntimeError(f"{steps} updates were asked for but {sorted(made)} made")


def _pack(state: TrainState) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "step": state.step,
        "module": trained_weights(state.module),
        "optimizer": state.optimizer.state_dict(),
        "ema": None if state.ema is None else state.ema.state_dict(),
    }


def _unpack(state: TrainState, path: Path, device: torch.device, *, where: str) -> None:
    try:
        saved = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:
        raise CheckpointError(f"the checkpoint {where} cannot be read: {error}") from error
    if saved["version"] != _VERSION:
        raise CheckpointError(
            f"the checkpoint {where} has format {saved['version']}, this program reads {_VERSION}"
        )
    try:
        load_trained_weights(state.module, saved["module"])
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.ema is not None:
            state.ema.load_state_dict(saved["ema"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"the checkpoint {where} does not fit the model: {reason}") from error
    state.step = saved["step"]
