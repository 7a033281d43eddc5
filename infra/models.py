"""A model at an address: a DIM folder, or the YAML that one is built from."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import dim.model
from dim.config import load_config
from dim.errors import CheckpointError
from dim.model import DIM, parts
from dim.model.autoencoder import Autoencoder
from dim.model.checkpoint import folder
from dim.model.conditioner import Conditioner
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


class FrozenModel(NamedTuple):
    """The parts of a DIM that are never trained, and what the whole of it is configured as."""

    conditioner: Conditioner
    autoencoder: Autoencoder
    config: ModelConfig


def load_frozen(init: str) -> FrozenModel:
    """Load only the frozen parts of what ``load_initial`` loads.

    Raises:
        CheckpointError, StorageError: as for ``load_initial``.
    """
    with _local(init) as path:
        if path.is_dir():
            config = folder.located(path, folder.read_description(path))
        else:
            config = load_config(ModelConfig, path)
        conditioner = parts.conditioner(config.understanding)
        return FrozenModel(conditioner, parts.autoencoder(config.autoencoder), config)


def save_model(model: DIM, address: str) -> None:
    """Write a complete model folder, which ``load_initial`` and ``dim.model.load`` read.

    Raises:
        StorageError: it cannot be uploaded.
    """
    if storage.is_local(address):
        model.save(storage.local_path(address))
        return
    with tempfile.TemporaryDirectory() as copy:
        model.save(copy)
        storage.upload_folder(copy, address)


def _load(init: str) -> DIM:
    with _local(init) as path:
        if path.is_dir():
            return dim.model.load(path)
        return dim.model.build(load_config(ModelConfig, path))


@contextmanager
def _local(init: str) -> Iterator[Path]:
    """A model folder or model YAML on this machine, downloaded for the while if need be."""
    if not storage.is_local(init):
        with tempfile.TemporaryDirectory() as copy:
            storage.download_folder(init, copy)
            yield Path(copy)
        return
    path = Path(storage.local_path(init))
    if not path.exists():
        raise CheckpointError(f"init: {init} is neither a model folder nor a model YAML")
    yield path
