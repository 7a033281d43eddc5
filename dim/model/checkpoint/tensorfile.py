"""Safetensors files a tensor at a time: headers without weights, reading, and writing in a stream.

safetensors writes a file from tensors that are all in memory. Here a file's header is written
first, then each tensor as it is made, so that a conversion holds one tensor and not a checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dim.errors import CheckpointError

# The floating types of trained weights, in the order in which safetensors itself lays them out.
FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
INDEX = ".safetensors.index.json"
ALIGNMENT = 8
MAX_SHARD_BYTES = 10 * 10**9

Shape = tuple[int, ...]
Produce = Callable[[str], Tensor]


@dataclass(frozen=True)
class Spec:
    """What a header says of a tensor: its type as safetensors writes it, and its shape."""

    dtype: str
    shape: Shape

    @property
    def count(self) -> int:
        """Numbers in the tensor."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor.

        Raises:
            CheckpointError: the type is no floating type.
        """
        if self.dtype not in FLOATS:
            raise CheckpointError(f"weights of type {self.dtype} are not supported")
        return self.count * FLOATS[self.dtype].itemsize


def spec_of(tensor: Tensor) -> Spec:
    """The spec of a floating tensor."""
    names = {dtype: name for name, dtype in FLOATS.items()}
    return Spec(names[tensor.dtype], tuple(tensor.shape))


class TensorFiles(Mapping[str, Spec]):
    """The tensors of one checkpoint, in one file or several: specs by name, weights on demand.

    Opening reads headers only, and checks that each file is as long as its header says. Weights
    are read into memory of their own: pages of a mapped file would count as the process's memory
    for as long as the file is open.

    Raises:
        CheckpointError: a file is missing, or is no whole safetensors file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = tuple(files)
        self.metadata: dict[str, str] = {}
        self._specs: dict[str, Spec] = {}
        self._readers: dict[str, Any] = {}
        for file in self.files:
            self._add(file)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor ``name``, or its ``rows`` on the first axis, in memory of its own.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        reader = self._readers[name]
        try:
            return reader.get_tensor(name) if rows is None else reader.get_slice(name)[rows]
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"cannot read {name}: {' '.join(str(error).split())}") from None

    def __getitem__(self, name: str) -> Spec:
        return self._specs[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)

    def _add(self, file: Path) -> None:
        if not file.is_file():
            raise CheckpointError(f"checkpoint not found: {file}")
        try:
            reader = safe_open(file, framework="pt", backend="pread")
            self.metadata |= reader.metadata() or {}
            for name in reader.keys():  # noqa: SIM118
                part = reader.get_slice(name)
                self._specs[name] = Spec(part.get_dtype(), tuple(part.get_shape()))
                self._readers[name] = reader
        except (SafetensorError, OSError) as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{file} is not a readable safetensors file: {reason}") from None


def open_folder(folder: Path, stem: str) -> TensorFiles:
    """``stem.safetensors`` in ``folder``, or the shards that its index names.

    Raises:
        CheckpointError: neither is there, a shard is missing or damaged, or the index names
            tensors that its shards lack.
    """
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}{INDEX}"
    if whole.is_file():
        return TensorFiles([whole])
    if not folder.is_dir():
        raise CheckpointError(f"checkpoint not found: {folder}")
    if not index.is_file():
        raise CheckpointError(f"{folder} holds neither {whole.name} nor {index.name}")
    places = _weight_map(index)
    files = sorted({folder / file for file in places.values()})
    if gone := [file.name for file in files if not file.is_file()]:
        raise CheckpointError(f"{index} names files that are not there: {', '.join(gone)}")
    tensors = TensorFiles(files)
    if lost := sorted(places.keys() - tensors.keys()):
        raise CheckpointError(f"{index} names tensors that its files lack: {', '.join(lost)}")
    return tensors


def write(
    file: Path,
    specs: Mapping[str, Spec],
    produce: Produce,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write ``file`` one tensor at a time; the bytes are those that ``save_file`` would write.

    Args:
        file: the safetensors file.
        specs: what it will hold.
        produce: gives the tensor of a name. It is called once a name, in the file's order.
        metadata: text beside the tensors.

    Raises:
        OSError: the disk refused.
        CheckpointError: ``produce`` gave another shape or type than the specs say.
    """
    ranks = {dtype: rank for rank, dtype in enumerate(FLOATS)}
    order = sorted(specs, key=lambda name: (ranks[specs[name].dtype], name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in order:
        spec = specs[name]
        header[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name in order:
            _write_tensor(stream, name, specs[name], produce(name))


def write_folder(
    folder: Path,
    stem: str,
    specs: Mapping[str, Spec],
    produce: Produce,
    *,
    metadata: Mapping[str, str] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``stem.safetensors`` into ``folder``, or shards and their index when it is larger.

    A shard holds at most ``max_shard_bytes``, or one larger tensor. Names and index are those of
    transformers and diffusers. Other arguments and errors: as for ``write``.
    """
    shards = _shards(specs, max_shard_bytes)
    if len(shards) == 1:
        write(folder / f"{stem}.safetensors", specs, produce, metadata)
        return
    places: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write(folder / file, {name: specs[name] for name in names}, produce, metadata)
        places |= dict.fromkeys(names, file)
    total = sum(spec.nbytes for spec in specs.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
    (folder / f"{stem}{INDEX}").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(specs: Mapping[str, Spec], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(specs):
        if shards[-1] and size + specs[name].nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += specs[name].nbytes
    return shards


def _weight_map(index: Path) -> dict[str, str]:
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(file) for name, file in places.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: {' '.join(str(error).split())}") from None


def _write_tensor(stream: Any, name: str, spec: Spec, tensor: Tensor) -> None:
    made = spec_of(tensor)
    if made != spec:
        raise CheckpointError(
            f"{name} is {made.dtype} {made.shape}, not {spec.dtype} {spec.shape} as announced"
        )
    stream.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
