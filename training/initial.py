"""The model that a stage starts from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import dim.model
from dim.config import load_config
from dim.errors import CheckpointError
from dim.model import DIM
from dim.model.config import ModelConfig
from infra import storage


def load_initial(init: str, *, edits: bool) -> DIM:
    """Load a DIM folder (local or in an object store), or build from a local model YAML.

    For an edit stage a text-to-image painter is widened to see the source's latent.

    Raises:
        CheckpointError: there is neither.
        StorageError: the folder cannot be read.
    """
    model = _load(init)
    if edits and not model.painter.takes_source:
        model.painter.widen()
    return model


def _load(init: str) -> DIM:
    if not storage.is_local(init):
        with tempfile.TemporaryDirectory() as folder:
            storage.download_folder(init, folder)
            return dim.model.load(folder)
    path = Path(storage.local_path(init))
    if path.is_dir():
        return dim.model.load(path)
    if path.is_file():
        return dim.model.build(load_config(ModelConfig, path))
    raise CheckpointError(f"init: {init} is neither a model folder nor a model YAML")
