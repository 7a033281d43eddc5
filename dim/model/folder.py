"""A DIM as a folder: one ``dim.json`` and the parts in their libraries' own formats."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dim import __version__
from dim.config import dump_config, validate_config
from dim.errors import CheckpointError, InputError
from dim.model import parts
from dim.model.conditioner import Conditioner
from dim.model.config import ModelConfig
from dim.model.connector import Connector
from dim.model.painter import Painter

FORMAT = 1
DESCRIPTION = "dim.json"
UNDERSTANDING = "understanding"
AUTOENCODER = "autoencoder"
PAINTER = "painter"
CONNECTOR_FILE = "connector.safetensors"


def write(
    path: Path,
    config: ModelConfig,
    modules: parts.Parts,
    *,
    reference: str | None,
) -> None:
    """Write the folder ``path``, all of it or nothing; an earlier DIM there is replaced.

    ``reference``: where the understanding model is, instead of a copy.

    Raises:
        InputError: something else than a DIM is at ``path``.
        CheckpointError: the disk refused.
    """
    if path.exists() and not (path / DESCRIPTION).is_file() and not _is_empty(path):
        raise InputError(f"{path} exists and is not a DIM folder; it is left as it is")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    try:
        if reference is None:
            _write_understanding(staging / UNDERSTANDING, modules.conditioner)
        modules.autoencoder.network.save_pretrained(staging / AUTOENCODER)
        write_painter(staging, modules.painter)
        write_connector(staging / CONNECTOR_FILE, modules.connector)
        _describe(staging, config, reference or UNDERSTANDING)
        staging.chmod(0o755)
        _replace(staging, path)
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_painter(folder: Path, painter: Painter) -> None:
    """``folder/painter/`` in diffusers' format and ``folder/null_condition.safetensors``."""
    painter.network.save_pretrained(folder / PAINTER)
    table = painter.null_condition.detach().cpu().contiguous()
    save_file({parts.NULL_CONDITION: table}, folder / parts.NULL_CONDITION_FILE)


def write_connector(file: Path, connector: Connector) -> None:
    """The connector as one safetensors file with the names ``0.*`` and ``2.*``."""
    save_file({k: v.detach().cpu().contiguous() for k, v in connector.state_dict().items()}, file)


def read(path: Path, dtype: torch.dtype | None) -> tuple[ModelConfig, parts.Parts, str]:
    """The parts in the folder ``path``, and where the understanding model came from.

    Raises:
        CheckpointError: no such folder, not a DIM, or a part is missing or damaged.
    """
    description = _description(path)
    config = validate_config(ModelConfig, description["config"], where=str(path / DESCRIPTION))
    needed = (PAINTER, AUTOENCODER, CONNECTOR_FILE, parts.NULL_CONDITION_FILE)
    if missing := [name for name in needed if not (path / name).exists()]:
        raise CheckpointError(f"{path} is incomplete: it lacks {', '.join(missing)}")
    inside = {
        "connector": str(path / CONNECTOR_FILE),
        "painter": str(path / PAINTER),
        "autoencoder": str(path / AUTOENCODER),
    }
    source = str(description["understanding"])
    if source == UNDERSTANDING:
        source = inside[UNDERSTANDING] = str(path.resolve() / UNDERSTANDING)
    located = _located(config, **inside)
    if UNDERSTANDING not in inside:
        # what is referred to lies as it was first loaded, so the configured type holds for it
        section = located.understanding.model_copy(update={"weights": source})
        located = located.model_copy(update={"understanding": section})
    return config, parts.make(located, dtype=dtype), source


def _located(config: ModelConfig, **weights: str) -> ModelConfig:
    """``config`` with other places of weights, by section, in the types found there."""
    sections = {
        name: getattr(config, name).model_copy(update={"weights": where, "dtype": None})
        for name, where in weights.items()
    }
    return config.model_copy(update=sections)


def _write_understanding(folder: Path, conditioner: Conditioner) -> None:
    with parts.without_progress_bars():
        conditioner.model.save_pretrained(folder)
    conditioner.tokenizer.save_pretrained(folder)
    conditioner.image_processor.save_pretrained(folder)


def _describe(folder: Path, config: ModelConfig, understanding: str) -> None:
    description = {
        "format": FORMAT,
        "dim": __version__,
        "understanding": understanding,
        "config": dump_config(config),
    }
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def _description(path: Path) -> dict[str, Any]:
    file = path / DESCRIPTION
    if not path.is_dir():
        raise CheckpointError(f"model folder not found: {path}")
    if not file.is_file():
        raise CheckpointError(f"{path} is not a DIM folder: it has no {DESCRIPTION}")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        written = description["format"]
        description["config"], description["understanding"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}") from None
    if written != FORMAT:
        raise CheckpointError(f"{file} has format {written}; this version reads format {FORMAT}")
    return description


def _replace(staging: Path, path: Path) -> None:
    """Put the finished folder in place; the old one is out of the way before it is deleted."""
    if not path.exists():
        staging.rename(path)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{path.name}-old-", dir=path.parent))
    path.rename(old)
    staging.rename(path)
    shutil.rmtree(old)


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
