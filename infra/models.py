"""A model at an address: a DIM folder, or the YAML that one is built from."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock

import dim.model
from dim.config import load_config, shipped
from dim.errors import CheckpointError, InputError, StorageError
from dim.model import DIM, parts
from dim.model.autoencoder import Autoencoder
from dim.model.checkpoint import folder
from dim.model.checkpoint.folder import Description
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig, VlmView
from dim.model.lora.adapter import LORA_FILE
from infra import storage
from infra.fingerprint import fingerprint
from infra.storage import Store


def load_initial(init: str, *, edits: bool, vlm_view: VlmView | None = None) -> DIM:
    """Load a DIM folder (local or in an object store), or build from a local model YAML.

    For an edit stage a text-to-image painter is widened to see the source's latent, and the model
    is configured to show its understanding model what the stage trains with (``vlm_view``).

    Raises:
        CheckpointError: there is neither.
        StorageError: the folder cannot be read.
    """
    model = _load(init)
    if edits and not model.painter.takes_source:
        model.painter.widen()
    if edits and vlm_view is not None:
        model.config = model.config.showing(vlm_view)
    return model


class FrozenModel(NamedTuple):
    """The parts of a DIM that are never trained, and what the whole of it is configured as."""

    conditioner: Conditioner
    autoencoder: Autoencoder
    config: ModelConfig

    @property
    def cell(self) -> int:
        """See ``DIM.cell``. Of the painter nothing but its configuration is read.

        Raises:
            CheckpointError: it has none, or a damaged one.
        """
        return self.autoencoder.factor * parts.patch_size(self.config.painter)


def load_frozen(init: str) -> FrozenModel:
    """Load only the frozen parts of what ``load_initial`` loads.

    Raises:
        CheckpointError, StorageError: as for ``load_initial``.
    """
    path = on_this_machine(init)
    if path.is_dir():
        config = folder.located(path, folder.read_description(path))
    else:
        config = load_config(ModelConfig, path)
    conditioner = parts.conditioner(config.understanding)
    return FrozenModel(conditioner, parts.autoencoder(config.autoencoder), config)


def save_model(model: DIM, address: str, understanding: str = "copy") -> None:
    """Write a complete model folder, which ``load_initial`` and ``dim.model.load`` read.

    It takes the place of an earlier one, and what a call that is cut off leaves does not load.

    Args:
        model: The model.
        address: Of the folder.
        understanding: ``"copy"`` or ``"reference"``, as for ``DIM.save``.

    Raises:
        InputError: there is nothing to refer to.
        CheckpointError, StorageError: it cannot be written.
    """
    if storage.is_local(address):
        model.save(storage.local_path(address), understanding)
        return
    with tempfile.TemporaryDirectory() as copy:
        model.save(copy, understanding)
        storage.replace_folder(copy, address, folder.DESCRIPTION)


def check_reference(init: str) -> None:
    """Refuse a start whose understanding model a later folder cannot refer to.

    Raises:
        InputError: it is random, or lies in the object store within the model's own folder.
        CheckpointError, StorageError: there is no such model.
    """
    store = storage.open_store(init)
    if store.is_local and Path(store.root).is_file():
        if load_config(ModelConfig, store.root).understanding.weights is None:
            raise InputError(f"{init} has a random understanding model: there is none to refer to")
        return
    if _description(store).holds_understanding and not store.is_local:
        raise InputError(
            f"{init} holds a copy of its understanding model, which no other folder can refer to "
            "in an object store: start from a model that refers to one, or copy it again"
        )


def read_config(address: str) -> ModelConfig:
    """What a DIM folder or a model YAML says of its model; no weight is fetched.

    Raises:
        CheckpointError: there is neither.
        StorageError: it cannot be read.
    """
    store = storage.open_store(shipped(address))
    if not store.exists():
        raise CheckpointError(f"{address} is neither a model folder nor a model YAML")
    if store.is_local:
        path = Path(store.root)
        if path.is_file():
            return load_config(ModelConfig, path)
    return _description(store).config


def _description(store: Store) -> Description:
    """What the ``dim.json`` of the folder ``store`` says."""
    if store.is_local:
        return folder.read_description(Path(store.root))
    with tempfile.TemporaryDirectory() as copy:
        if store.is_file(folder.DESCRIPTION):
            Path(copy, folder.DESCRIPTION).write_bytes(store.read(folder.DESCRIPTION))
        return folder.read_description(Path(copy))


def _load(init: str) -> DIM:
    path = on_this_machine(init)
    if path.is_dir():
        return dim.model.load(path)
    return dim.model.build(load_config(ModelConfig, path))


def on_this_machine(address: str, holds: str = folder.DESCRIPTION) -> Path:
    """A model folder or model YAML as files of this machine.

    One in an object store is fetched by whichever process asks for it first, and the others wait;
    it is kept in the folder that ``DIM_CACHE`` names, else among the machine's temporary files.

    Args:
        address: of it.
        holds: the file without which a folder in an object store is none.

    Raises:
        CheckpointError: there is neither at a local address, or no finished folder at another.
        StorageError: the folder cannot be read, changes meanwhile, or there is no place for it.
    """
    if storage.is_local(address):
        path = Path(storage.local_path(address))
        if not path.exists():
            raise CheckpointError(f"{address} is neither a model folder nor a model YAML")
        return path
    if not storage.open_store(address).is_file(holds):
        raise CheckpointError(f"{address} is no finished folder: no {holds}")
    kept = _cache() / fingerprint(address)
    with FileLock(f"{kept}.lock"):
        if not kept.is_dir():
            storage.download_folder(address, f"{kept}.part")
            if fingerprint(address) != kept.name:
                shutil.rmtree(f"{kept}.part")
                raise StorageError(f"{address} was written anew while it was fetched: try again")
            Path(f"{kept}.part").rename(kept)
    return kept


def adapter_here(spec: str) -> str:
    """An adapter ``ADDRESS[:WEIGHT]`` with its folder on this machine; a path is left as it is.

    Raises:
        CheckpointError, StorageError: as of ``on_this_machine``.
    """
    if "://" not in spec:
        return spec
    found = re.fullmatch(r"(?P<address>.+?)(?P<weight>:[-+.\deE]+)?", spec)
    assert found is not None
    here = on_this_machine(found["address"], LORA_FILE)
    return f"{here}{found['weight'] or ''}"


def _cache() -> Path:
    chosen = os.environ.get("DIM_CACHE")
    place = Path(chosen or f"{tempfile.gettempdir()}/dim-models-{os.getuid()}").expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        mine = place.stat().st_uid == os.getuid()
    except OSError as error:
        raise StorageError(f"{place} cannot keep models ({error}); set DIM_CACHE") from None
    if not (chosen or mine):  # temporary files are everybody's
        raise StorageError(f"{place} belongs to somebody else; set DIM_CACHE")
    return place
