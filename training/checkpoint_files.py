"""The files of a checkpoint: which worker writes which part of which tensor, and reads which back.

Who writes and who reads what is ``torch.distributed.checkpoint``'s plan: a part that several
workers hold is written by one of them, and a worker reads the parts that lie in what it holds,
whoever saved them. What is written are the tensors' bytes, and JSON: to read it runs nothing.

A checkpoint is a folder:

- one file of tensors from each worker, part after part;
- ``layout-….json``: of each tensor type and shape, of each part where it lies and its CRC-32;
- ``manifest.json``, written last: without it there is no checkpoint. It has the size and SHA-256
  of the other files, what is no tensor, and a SHA-256 of itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from pydantic import ValidationError
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random_exponential
from torch import Tensor
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem

from dim.config import StrictModel
from dim.errors import CheckpointError, StorageUnavailable
from infra.storage import Store
from training import parallel

FORMAT = 3
MANIFEST = "manifest.json"
FORMER_FILE = "state.pt"  # of the formats before

_RUN = 32 << 20  # bytes that are read at a time
_AT_ONCE = 4  # such reads
_READ_PATIENCE_S = 60.0
_MANIFEST_BYTES = 64 << 20
_LAYOUT_BYTES = 1 << 30  # of 64 workers with 2,000 tensors each it has 15 MB


class FileFacts(StrictModel):
    """What a file of a checkpoint must be."""

    size: int
    sha256: str


class Manifest(StrictModel):
    """What a checkpoint is, beside its tensors.

    ``metrics`` were measured at this very step; ``values`` are the state's that are no tensors;
    ``saved_at`` is a time in seconds since 1970.
    """

    format: int
    step: int
    saved_at: float
    workers: int
    metrics: dict[str, float]
    values: dict[str, Any]
    layout: str
    files: dict[str, FileFacts]


class Place(NamedTuple):
    """Where the bytes of a part of a tensor lie. ``offset`` and ``sizes`` say which part it is."""

    offset: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    nbytes: int
    crc32: int


@dataclass(frozen=True)
class Saved:
    """A tensor in a checkpoint."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    places: list[Place]


Layout = dict[str, Saved]
"""Every tensor of a checkpoint, by name."""


def patiently(seconds: float) -> Retrying:
    """Try again for so long what a store that is away has not let happen."""
    return Retrying(
        retry=retry_if_exception_type(StorageUnavailable),
        stop=stop_after_delay(seconds),
        wait=wait_random_exponential(1, max=20),
        reraise=True,
    )


class Snapshot:
    """This worker's part of the state, copied to the CPU while the state goes on changing.

    A worker copies what it will write and nothing else. The copies are made in the same memory
    every time, pinned where there is a GPU, so only one snapshot is in use at a time.
    """

    def __init__(self, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
        """Share out ``tensors``, which every worker has under the same names (a collective)."""
        self.names = list(tensors)
        self._items = _share_out(tensors, group)
        pinned = any(tensor.is_cuda for tensor in tensors.values())
        self._copies = [
            torch.empty(_chunk(item).sizes, dtype=_dtype(item), pin_memory=pinned)
            for item in self._items
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of the CPU's memory that are held for it."""
        return sum(copy.nbytes for copy in self._copies)

    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the values that ``tensors`` have now."""
        planner = _save_planner(tensors)
        for item, copy in zip(self._items, self._copies, strict=True):
            copy.copy_(cast(Tensor, planner.resolve_data(item)), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()

    def write(self, store: Store, name: str) -> tuple[FileFacts, Layout]:
        """Write it as file ``name``; the tensors have this worker's places only.

        Raises:
            StorageError: it cannot be written.
        """
        layout: Layout = {}
        with store.open_upload(name) as file:
            for item, copy in zip(self._items, self._copies, strict=True):
                data = copy.reshape(-1).view(torch.uint8).numpy().data
                place = Place(
                    tuple(_chunk(item).offsets), tuple(copy.shape), _short(name), file.tell(),
                    len(data), zlib.crc32(data),
                )  # fmt: skip
                file.write(data)
                assert item.tensor_data is not None
                layout[item.index.fqn] = Saved(copy.dtype, tuple(item.tensor_data.size), [place])
        return FileFacts(size=file.size, sha256=file.sha256), layout


def merged(layouts: Sequence[Layout]) -> Layout:
    """The layouts of all workers' files as one."""
    whole: Layout = {}
    for layout in layouts:
        for name, saved in layout.items():
            known = whole.setdefault(name, Saved(saved.dtype, saved.shape, []))
            known.places.extend(saved.places)
    return whole


def write_layout(store: Store, name: str, layout: Layout) -> FileFacts:
    """Write a layout as file ``name``.

    Raises:
        StorageError: it cannot be written.
    """
    packed = {
        tensor: [str(saved.dtype).removeprefix("torch."), saved.shape, saved.places]
        for tensor, saved in layout.items()
    }
    data = json.dumps(packed).encode()
    store.write(name, data)
    return FileFacts(size=len(data), sha256=hashlib.sha256(data).hexdigest())


def write_manifest(store: Store, folder: str, manifest: Manifest) -> None:
    """Write the manifest, by which ``folder`` becomes a checkpoint.

    Raises:
        StorageError: it cannot be written.
    """
    text = json.dumps(manifest.model_dump(), sort_keys=True)
    whole = {"sha256": hashlib.sha256(text.encode()).hexdigest(), "manifest": text}
    store.write(f"{folder}/{MANIFEST}", json.dumps(whole).encode())


def read_manifest(store: Store, folder: str) -> Manifest:
    """The manifest of a checkpoint.

    Raises:
        CheckpointError: it is damaged, or of another format.
        StorageError: it cannot be read.
    """
    name = f"{folder}/{MANIFEST}"
    data = patiently(_READ_PATIENCE_S)(store.read, name, most=_MANIFEST_BYTES)
    try:
        whole = json.loads(data)
        text = whole["manifest"]
        if hashlib.sha256(text.encode()).hexdigest() != whole["sha256"]:
            raise CheckpointError(f"the checksum of {store.address(name)} is wrong")
        values = json.loads(text)
        if values["format"] != FORMAT:
            raise CheckpointError(
                f"{store.address(folder)} has format {values['format']}, and this program reads "
                f"{FORMAT}"
            )
        manifest = Manifest.model_validate(values)
    except (ValueError, TypeError, KeyError, AttributeError, ValidationError) as error:
        raise CheckpointError(
            f"{store.address(name)} is not whole ({type(error).__name__})"
        ) from None
    if any("/" in file for file in manifest.files) or manifest.layout not in manifest.files:
        raise CheckpointError(f"{store.address(name)} names files that are not a checkpoint's")
    return manifest


def read_layout(store: Store, folder: str, manifest: Manifest) -> Layout:
    """Where the tensors of a checkpoint lie.

    Raises:
        CheckpointError: the file is damaged.
        StorageError: it cannot be read.
    """
    name = f"{folder}/{manifest.layout}"
    data = patiently(_READ_PATIENCE_S)(store.read, name, most=_LAYOUT_BYTES)
    if hashlib.sha256(data).hexdigest() != manifest.files[manifest.layout].sha256:
        raise CheckpointError(f"the checksum of {store.address(name)} is wrong")
    layout = {}
    for tensor, (dtype, shape, places) in json.loads(data).items():
        found = [Place(tuple(at), tuple(sizes), *rest) for at, sizes, *rest in places]
        layout[tensor] = Saved(getattr(torch, dtype), tuple(shape), found)
    return layout


def read_into(tensors: Mapping[str, Tensor], store: Store, folder: str, layout: Layout) -> None:
    """Fill ``tensors`` in place with what a checkpoint has under their names.

    Of a sharded tensor only this worker's part is read. Every byte that is read is checked.

    Raises:
        CheckpointError: a tensor is missing or has another shape or type, a file is too short, or a
            checksum is wrong.
        StorageError: a file cannot be read.
    """
    _check_fit(tensors, layout)
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), _metadata(layout), is_coordinator=False)
    wanted: dict[Place, list[ReadItem]] = defaultdict(list)
    by_offset = {
        (name, place.offset): place for name, saved in layout.items() for place in saved.places
    }
    for item in planner.create_local_plan().items:
        index = item.storage_index
        assert index.offset is not None
        wanted[by_offset[index.fqn, tuple(index.offset)]].append(item)

    def read(run: list[Place]) -> None:
        for place, data in _read_run(store, folder, run):
            for item in wanted[place]:
                saved = torch.frombuffer(data, dtype=layout[item.storage_index.fqn].dtype)
                part = narrow_tensor_by_index(
                    saved.reshape(place.sizes), item.storage_offsets, item.lengths
                )
                planner.resolve_tensor(item).detach().copy_(part)

    with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="checkpoint") as threads:
        list(threads.map(read, _runs(list(wanted))))


def _share_out(tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> list[WriteItem]:
    """The parts that this worker writes (a collective)."""
    planner = _save_planner(tensors)
    plans = parallel.gather([planner.create_local_plan()], group)
    shared: list[SavePlan | Exception] | None = None
    if plans is not None:
        try:
            shared = list(planner.create_global_plan(plans)[0])
        except Exception as error:  # the others wait for an answer
            shared = [error] * len(plans)
    mine = parallel.scatter(shared, group)
    if isinstance(mine, Exception):
        raise mine
    return list(mine.items)


def _save_planner(tensors: Mapping[str, Tensor]) -> DefaultSavePlanner:
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(dict(tensors), is_coordinator=False)
    return planner


def _chunk(item: WriteItem) -> ChunkStorageMetadata:
    assert item.tensor_data is not None
    return item.tensor_data.chunk


def _dtype(item: WriteItem) -> torch.dtype:
    assert item.tensor_data is not None
    return item.tensor_data.properties.dtype


def _short(name: str) -> str:
    return name.rpartition("/")[2]


def _check_fit(tensors: Mapping[str, Tensor], layout: Layout) -> None:
    """Whether what is saved is what there is to load.

    Raises:
        CheckpointError: it is not; the message names a tensor.
    """
    for name in sorted(tensors.keys() | layout.keys()):
        if name not in layout:
            raise CheckpointError(f"it does not fit the model: it lacks {name}")
        if name not in tensors:
            raise CheckpointError(f"it does not fit the model, which has no {name}")
        saved, tensor = layout[name], tensors[name]
        if (saved.shape, saved.dtype) != (tuple(tensor.shape), tensor.dtype):
            raise CheckpointError(
                f"it does not fit the model: {name} is {saved.shape} of {saved.dtype}, not "
                f"{tuple(tensor.shape)} of {tensor.dtype}"
            )
        if sum(math.prod(place.sizes) for place in saved.places) != math.prod(saved.shape):
            raise CheckpointError(f"a part of {name} is missing")


def _metadata(layout: Layout) -> Metadata:
    return Metadata(
        {
            name: TensorStorageMetadata(
                TensorProperties(dtype=saved.dtype),
                torch.Size(saved.shape),
                [
                    ChunkStorageMetadata(torch.Size(place.offset), torch.Size(place.sizes))
                    for place in saved.places
                ],
            )
            for name, saved in layout.items()
        }
    )


def _runs(places: list[Place]) -> Iterator[list[Place]]:
    """Neighbours in a file together, up to what is read at a time."""
    run: list[Place] = []
    for place in sorted(places, key=lambda place: (place.file, place.start)):
        if run and (
            place.file != run[0].file
            or place.start != run[-1].start + run[-1].nbytes
            or place.start + place.nbytes - run[0].start > _RUN
        ):
            yield run
            run = []
        run.append(place)
    if run:
        yield run


def _read_run(store: Store, folder: str, run: list[Place]) -> Iterator[tuple[Place, bytearray]]:
    first, last = run[0], run[-1]
    name = f"{folder}/{first.file}"
    size = last.start + last.nbytes - first.start
    data = memoryview(patiently(_READ_PATIENCE_S)(store.read_part, name, first.start, size))
    if len(data) < size:
        raise CheckpointError(f"{store.address(name)} is cut short")
    for place in run:
        start = place.start - first.start
        part = bytearray(data[start : start + place.nbytes])
        if zlib.crc32(part) != place.crc32:
            raise CheckpointError(f"a checksum in {store.address(name)} is wrong")
        if part:
            yield place, part
