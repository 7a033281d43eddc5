"""The end of a stage: a complete model folder that ``dim.model.load`` reads."""

from __future__ import annotations

import tempfile

from dim.learning.ema import averaged
from infra import storage
from training.worker import Worker

MODEL_FOLDER = "model"


def export(worker: Worker) -> str:
    """Write the model, with the averaged weights if there are any, to ``out/model``."""
    target = storage.join(worker.config.out, MODEL_FOLDER)
    with averaged(worker.state.ema):
        if storage.is_local(target):
            worker.model.save(storage.local_path(target))
        else:
            with tempfile.TemporaryDirectory() as folder:
                worker.model.save(folder)
                storage.upload_folder(folder, target)
    return target
