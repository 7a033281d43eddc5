"""From a DIM folder back to the published layout, a tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from dim.errors import CheckpointError, InputError
from dim.model import parts, released
from dim.model.checkpoint import folder, tensorfile
from dim.model.checkpoint.finite import is_finite, refuse_not_finite
from dim.model.checkpoint.folder import Description
from dim.model.checkpoint.tensorfile import MAX_SHARD_BYTES, Spec, TensorFiles
from dim.model.released import AUTOENCODER, CONNECTOR, NULL_TABLE, UNDERSTANDING

HEAD_DIMS = ("attention_head_dim", "cross_attention_head_dim")


def export_checkpoint(
    path: str | Path,
    out: str | Path,
    *,
    autoencoder: bool | None = None,
    understanding: bool | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write the published checkpoint of a DIM folder, all of it or nothing.

    Weights keep their types and bits: the export of an import is the checkpoint again, but for
    what the import left out or was told to change.

    Args:
        path: the DIM folder.
        out: a file that ends in ``.safetensors``, which is replaced; or a new or empty folder,
            which gets ``model.safetensors`` or its shards.
        autoencoder, understanding: whether to write the frozen parts too. None: if they came from
            the published checkpoint that the folder is an import of.
        max_shard_bytes: larger checkpoints are written into a folder in shards.

    Returns:
        The files.

    Raises:
        CheckpointError: no such folder, not a DIM, damaged, or weights that are not finite; or
            the disk refused.
        InputError: ``out`` is a folder with something in it, or the understanding model is asked
            for and not in reach.
    """
    path, out = Path(path), Path(out)
    description = folder.read_description(path)
    source = Source(path)
    source.add_trained()
    taken = description.provenance.sections if description.provenance else ()
    if AUTOENCODER in taken if autoencoder is None else autoencoder:
        source.add_files(AUTOENCODER, path / folder.AUTOENCODER, folder.NETWORK_STEM)
    own = UNDERSTANDING in taken and description.holds_understanding
    if own if understanding is None else understanding:
        place = _understanding(path, description)
        source.add_files(UNDERSTANDING, place, folder.UNDERSTANDING_STEM)
    heads = _head_dims(path)
    released.require_layout(str(path), *released.read_layout(source.specs, *heads.values()))
    provenance = description.provenance
    metadata = provenance.metadata if provenance else {"format": "pt"} | _texts(heads)
    if (view := description.config.understanding.vlm_view) != "whole":
        metadata = metadata | {released.VIEW: view}
    if out.suffix == ".safetensors":
        return _write_file(out, source, metadata)
    return _write_folder(out, source, metadata, max_shard_bytes)


class Source:
    """The tensors of a DIM folder under their published names.

    ``specs``: what there is. ``produce`` reads one.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.specs: dict[str, Spec] = {}
        self.not_finite: list[str] = []
        self._readers: dict[str, Callable[[], Tensor]] = {}

    def produce(self, name: str) -> Tensor:
        """The tensor ``name``; remembered if it is not finite."""
        tensor = self._readers[name]()
        if name != released.UNUSED and not is_finite(tensor):
            self.not_finite.append(name)
        return tensor

    def add_trained(self) -> None:
        """Connector, null table, painter, and what the published network does not use.

        Raises:
            CheckpointError: one of them is missing or damaged.
        """
        connector = TensorFiles([self.path / folder.CONNECTOR_FILE])
        for name in connector:
            self._add(CONNECTOR + name, connector, [name])
        table = TensorFiles([self.path / parts.NULL_CONDITION_FILE])
        self._add(NULL_TABLE, table, [parts.NULL_CONDITION])
        self._add_painter(tensorfile.open_folder(self.path / folder.PAINTER, folder.NETWORK_STEM))
        if (self.path / folder.UNUSED_FILE).is_file():
            unused = TensorFiles([self.path / folder.UNUSED_FILE])
            self._add(released.UNUSED, unused, [released.UNUSED])

    def add_files(self, prefix: str, place: Path, stem: str) -> None:
        """All tensors of ``place/stem`` behind ``prefix``.

        Raises:
            CheckpointError: they are missing or damaged.
        """
        files = tensorfile.open_folder(place, stem)
        for name in files:
            self._add(prefix + name, files, [name])

    def _add_painter(self, files: TensorFiles) -> None:
        stacks: dict[str, dict[int, str]] = {}
        counts: dict[str, int] = {}
        for name in files:
            published, part, counts[published] = released.published_place(name)
            stacks.setdefault(published, {})[part] = name
        if torn := [name for name, stack in stacks.items() if len(stack) < counts[name]]:
            raise CheckpointError(f"{self.path}: the painter lacks parts of {', '.join(torn)}")
        for published, stack in stacks.items():
            self._add(published, files, [stack[part] for part in sorted(stack)])

    def _add(self, published: str, files: TensorFiles, names: list[str]) -> None:
        """``published`` is the tensors ``names`` of ``files``, stacked."""
        if absent := [name for name in names if name not in files]:
            raise CheckpointError(f"{files.files[0]}: missing {', '.join(absent)}")
        first = files[names[0]]
        if any(files[name] != first for name in names):
            raise CheckpointError(f"{files.files[0]}: {', '.join(names)} differ in shape or type")
        if len(names) == 1:
            self.specs[published] = first
            self._readers[published] = lambda: files.read(names[0])
        else:
            self.specs[published] = Spec(
                first.dtype, (first.shape[0] * len(names), *first.shape[1:])
            )
            self._readers[published] = lambda: torch.cat([files.read(name) for name in names])


def _understanding(path: Path, description: Description) -> Path:
    place = description.understanding_in_reach(path)
    if place is None:
        raise InputError(
            f"{path} refers to the understanding model {description.understanding}, which is no "
            f"folder here: export without it"
        )
    return place


def _head_dims(path: Path) -> dict[str, int]:
    """Features of the painter's heads, which no tensor shows."""
    file = path / folder.PAINTER / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        return {name: int(config[name]) for name in HEAD_DIMS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged: {' '.join(str(error).split())}") from None


def _texts(heads: dict[str, int]) -> dict[str, str]:
    return {name: str(size) for name, size in heads.items()}


def _write_file(out: Path, source: Source, metadata: dict[str, str]) -> list[Path]:
    if out.is_dir():
        raise InputError(f"{out} is a folder, not a safetensors file")
    with folder.staging(out) as staged:
        tensorfile.write(staged / out.name, source.specs, source.produce, metadata)
        refuse_not_finite(str(source.path), source.not_finite)
        (staged / out.name).replace(out)
    return [out]


def _write_folder(
    out: Path, source: Source, metadata: dict[str, str], max_shard_bytes: int
) -> list[Path]:
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise InputError(f"{out} exists and is not an empty folder; it is left as it is")
    with folder.staging(out) as staged:
        tensorfile.write_folder(
            staged,
            released.STEM,
            source.specs,
            source.produce,
            metadata=metadata,
            max_shard_bytes=max_shard_bytes,
        )
        refuse_not_finite(str(source.path), source.not_finite)
        folder.replace(staged, out)
    return sorted(out.iterdir())
