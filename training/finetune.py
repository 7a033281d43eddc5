"""Fine-tuning: an adapter in the model before the first step, and in files after the last.

A stage without ``lora`` trains all of connector and painter; here it passes through.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from dim.model import DIM
from dim.model.lora import layers
from dim.model.lora.adapter import LORA_FILE
from infra import storage
from infra.models import save_model
from training.log import RunLog
from training.record import ADAPTER_FOLDER, MODEL_FOLDER, discard_partial
from training.stage import StageConfig


def attach(model: DIM, config: StageConfig) -> None:
    """Freeze all of ``model`` but the adapter that ``config.lora`` asks for, which is put in.

    Under bf16 what is frozen is kept in bfloat16, what learns in float32.

    Raises:
        InputError: the adapter does not fit the model; the message says why.
    """
    if config.lora is None:
        return
    frozen = torch.bfloat16 if config.precision == "bf16" else None
    layers.attach(model, config.lora, seed=config.seed, frozen=frozen)


def key_dropout(model: DIM, config: StageConfig, noise: torch.Tensor) -> None:
    """Let the adapter's dropout, if it has one, depend on the rows of ``noise`` (B, C, h, w)."""
    if config.lora is not None and config.lora.dropout:
        layers.key_dropout(model, noise)


def export(model: DIM, config: StageConfig, log: RunLog) -> None:
    """Write what the stage made into its output: the adapter, also for MLflow, or the whole model.

    Raises:
        CheckpointError, StorageError: it cannot be written.
    """
    discard_partial(config.out)
    if config.lora is None:
        address = storage.join(config.out, MODEL_FOLDER)
        save_model(model, address, config.export_understanding)
        return
    with tempfile.TemporaryDirectory() as folder:
        layers.save(model, config.lora, Path(folder))
        storage.replace_folder(folder, storage.join(config.out, ADAPTER_FOLDER), LORA_FILE)
        for file in sorted(Path(folder).iterdir()):
            log.file(file, ADAPTER_FOLDER)
