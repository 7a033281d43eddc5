"""A DIM as a folder: one ``dim.json`` and the parts in their libraries' own formats."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import PositiveInt
from safetensors.torch import save_file

from dim import __version__
from dim.config import StrictModel, dump_config, validate_config
from dim.errors import CheckpointError, InputError
from dim.model import parts
from dim.model.checkpoint.reference import everywhere, fingerprint, require_same
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig, Task, weights_path
from dim.model.connector import Connector
from dim.model.painter import Painter

FORMAT = 1
DESCRIPTION = "dim.json"
UNDERSTANDING = "understanding"
AUTOENCODER = "autoencoder"
PAINTER = "painter"
CONNECTOR_FILE = "connector.safetensors"
# What a published checkpoint holds and no part uses; kept for the way back.
UNUSED_FILE = "unused.safetensors"
NETWORK_STEM = "diffusion_pytorch_model"
UNDERSTANDING_STEM = "model"


class Provenance(StrictModel):
    """The published checkpoint that a folder's connector and painter started from.

    ``checkpoint``: the file or folder as it was given. ``task``: the checkpoint's, ``edit`` if its
    painter sees a source latent. ``sections``: the prefixes of the tensors that were taken;
    ``left_out``: of those that were not. ``metadata``: the text in its header.
    ``null_condition_tokens``: rows of its null table.
    """

    checkpoint: str
    task: Task
    sections: tuple[str, ...]
    left_out: tuple[str, ...]
    metadata: dict[str, str]
    null_condition_tokens: PositiveInt


@dataclass(frozen=True)
class Description:
    """A ``dim.json``.

    ``understanding``: where the understanding model is; ``UNDERSTANDING`` is in the folder.
    ``fingerprint``: of one elsewhere, see ``dim.model.checkpoint.reference``; None if it was not at
    hand. ``version``: of the program that wrote it.
    """

    config: ModelConfig
    understanding: str
    fingerprint: str | None
    provenance: Provenance | None
    version: str

    @property
    def holds_understanding(self) -> bool:
        """Whether the understanding model is in the folder, and not referred to."""
        return self.understanding == UNDERSTANDING

    def understanding_in_reach(self, path: Path) -> Path | None:
        """The understanding model of the folder ``path``; None if it is no folder here."""
        if self.holds_understanding:
            return path / UNDERSTANDING
        place = Path(weights_path(self.understanding))
        return place if place.is_dir() else None


def write(
    path: Path,
    config: ModelConfig,
    modules: parts.Parts,
    *,
    reference: str | None,
    provenance: Provenance | None = None,
) -> None:
    """Write the folder ``path``, all of it or nothing; an earlier DIM there is replaced.

    ``reference``: where the understanding model is, instead of a copy. ``provenance``: the
    checkpoint that connector and painter started from.

    Raises:
        InputError: something else than a DIM is at ``path``.
        CheckpointError: the disk refused.
    """
    with replacing(path) as staged:
        if reference is None:
            write_understanding(staged / UNDERSTANDING, modules.conditioner)
        modules.autoencoder.network.save_pretrained(staged / AUTOENCODER)
        write_painter(staged, modules.painter)
        write_connector(staged / CONNECTOR_FILE, modules.connector)
        describe(staged, config, reference and everywhere(reference), provenance)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new folder to fill, which takes the place of ``path`` when the block ends well.

    Raises:
        InputError: something else than a DIM is at ``path``.
        CheckpointError: the disk refused.
    """
    if path.exists() and not (path / DESCRIPTION).is_file() and not _is_empty(path):
        raise InputError(f"{path} exists and is not a DIM folder; it is left as it is")
    with staging(path) as staged:
        yield staged
        replace(staged, path)


@contextmanager
def staging(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write in; it is gone after the block, unless moved.

    Raises:
        CheckpointError: the disk refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        yield staged
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def write_painter(folder: Path, painter: Painter) -> None:
    """``folder/painter/`` in diffusers' format and ``folder/null_condition.safetensors``."""
    painter.network.save_pretrained(folder / PAINTER)
    table = painter.null_condition.detach().cpu().contiguous()
    save_file({parts.NULL_CONDITION: table}, folder / parts.NULL_CONDITION_FILE)


def write_connector(file: Path, connector: Connector) -> None:
    """The connector as one safetensors file with the names ``0.*`` and ``2.*``."""
    save_file({k: v.detach().cpu().contiguous() for k, v in connector.state_dict().items()}, file)


def read(path: Path, dtype: torch.dtype | None) -> tuple[Description, parts.Parts]:
    """The parts in the folder ``path``, and what its ``dim.json`` says.

    The described understanding model is where it was loaded from.

    Raises:
        CheckpointError: no such folder, not a DIM, or a part is missing or damaged; or the
            understanding model that it refers to is gone, or has become another one.
    """
    description = read_description(path)
    needed = (PAINTER, AUTOENCODER, CONNECTOR_FILE, parts.NULL_CONDITION_FILE)
    if missing := [name for name in needed if not (path / name).exists()]:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(missing)}")
    config = located(path, description)
    found = dataclasses.replace(description, understanding=str(config.understanding.weights))
    return found, parts.make(config, dtype=dtype)


def located(path: Path, description: Description) -> ModelConfig:
    """The configuration of the folder ``path`` with the places of its parts' weights.

    What is in the folder keeps the type that it has there. What is referred to lies as it was
    first loaded, so the configured type holds for it.

    Raises:
        CheckpointError: what is referred to is gone, or has become another.
    """
    config = description.config
    if description.fingerprint is not None:
        require_same(path, description.understanding, description.fingerprint)
    inside = {
        "connector": path / CONNECTOR_FILE,
        "painter": path / PAINTER,
        "autoencoder": path / AUTOENCODER,
    }
    referred = {"weights": description.understanding}
    sections = {"understanding": config.understanding.model_copy(update=referred)}
    if description.holds_understanding:
        inside[UNDERSTANDING] = path.resolve() / UNDERSTANDING
    sections |= {
        name: getattr(config, name).model_copy(update={"weights": str(place), "dtype": None})
        for name, place in inside.items()
    }
    return config.model_copy(update=sections)


def write_understanding(folder: Path, conditioner: Conditioner) -> None:
    """The understanding model in transformers' format, with tokenizer and image processor."""
    with parts.without_progress_bars():
        conditioner.model.save_pretrained(folder)
    conditioner.tokenizer.save_pretrained(folder)
    conditioner.image_processor.save_pretrained(folder)


def describe(
    folder: Path, config: ModelConfig, referred: str | None, provenance: Provenance | None
) -> None:
    """Write the ``dim.json`` of ``folder``, which makes it a DIM.

    ``referred``: where the understanding model is; None: in the folder.
    """
    description = {
        "format": FORMAT,
        "dim": __version__,
        "understanding": referred or UNDERSTANDING,
        "fingerprint": referred and _fingerprint(referred),
        "provenance": None if provenance is None else dump_config(provenance),
        "config": dump_config(config),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_description(path: Path) -> Description:
    """What the ``dim.json`` of the folder ``path`` says.

    Raises:
        CheckpointError: no such folder, not a DIM, or a damaged or later description.
        ConfigError: its configuration is none.
    """
    file = path / DESCRIPTION
    if not path.is_dir():
        raise CheckpointError(f"model folder not found: {path}")
    if not file.is_file():
        raise CheckpointError(f"{path} is not a DIM folder: it has no {DESCRIPTION}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        written = description["format"]
        config, understanding = description["config"], str(description["understanding"])
        known = description.get("fingerprint")
        provenance, version = description.get("provenance"), str(description.get("dim"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    if written != FORMAT:
        raise CheckpointError(f"{file} has format {written}; this version reads format {FORMAT}")
    return Description(
        validate_config(ModelConfig, config, where=str(file)),
        understanding,
        None if known is None else str(known),
        provenance and validate_config(Provenance, provenance, where=str(file)),
        version,
    )


def _fingerprint(referred: str) -> str | None:
    """Of an understanding model that is at hand; loading will tell whether the other is there."""
    try:
        return fingerprint(referred)
    except CheckpointError:
        return None


def replace(staged: Path, path: Path) -> None:
    """Put the finished folder in place; the old one is out of the way before it is deleted."""
    staged.chmod(0o755)
    if not path.exists():
        staged.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(old)
    staged.rename(path)
    shutil.rmtree(old)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
