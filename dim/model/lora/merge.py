"""Adapters merged into weights: of a model in memory, or from one DIM folder to another."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from dim.config import dump_config
from dim.errors import CheckpointError, InputError
from dim.model import parts
from dim.model.checkpoint import content, folder, tensorfile
from dim.model.checkpoint.finite import is_finite
from dim.model.checkpoint.tensorfile import MAX_SHARD_BYTES, Produce, Shape, TensorFiles
from dim.model.config import ModelConfig
from dim.model.lora.adapter import CONNECTOR, NULL_CONDITION, TRANSFORMER, Adapter, read_adapter

if TYPE_CHECKING:
    from dim.model.dim import DIM


# Prefix of an adapter's names → where in a DIM folder their tensors lie: folder and stem.
PLACES = {
    TRANSFORMER: (folder.PAINTER, folder.NETWORK_STEM),
    CONNECTOR: ("", folder.CONNECTOR_FILE.removesuffix(".safetensors")),
    "": ("", parts.NULL_CONDITION_FILE.removesuffix(".safetensors")),
}
# What no adapter changes.
COPIED = (folder.UNDERSTANDING, folder.AUTOENCODER, folder.UNUSED_FILE)


class Weighted(NamedTuple):
    """An adapter and how much of it: 0 is nothing, 1 all that was learnt."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True)
class Merged:
    """Adapters in a model's weights, and the weights and configuration that were there before.

    The tensors that were replaced are kept as they are, not computed back from the sums: what
    ``unmerge`` restores has the same bits. Let go of this object to give their memory back.
    """

    model: DIM
    config: ModelConfig
    kept: tuple[tuple[nn.Parameter, Tensor], ...]

    def unmerge(self) -> None:
        """Put back what was there before."""
        self.model.config = self.config
        for parameter, base in self.kept:
            parameter.data = base


def parse(spec: str) -> tuple[Path, float]:
    """Path and weight of ``PATH[:WEIGHT]``; without one the weight is 1.

    Raises:
        InputError: the weight is infinite or no number.
    """
    path, separator, tail = spec.rpartition(":")
    if not separator or Path(spec).exists():
        return Path(spec), 1.0
    try:
        weight = float(tail)
    except ValueError:
        raise InputError(
            f"LoRA adapter {spec!r}: there is nothing there, and {tail!r} is no weight to follow "
            f"a path (PATH:0.8)"
        ) from None
    if not math.isfinite(weight):
        raise InputError(f"LoRA adapter {spec!r}: the weight must be finite")
    return Path(path), weight


def hashes(specs: Iterable[str]) -> str:
    """``HASH:WEIGHT`` of each adapter, as an image says what it was painted with.

    Raises:
        InputError: as for ``parse``.
    """
    return ", ".join(
        f"{content.of_path(path)[: content.SHOWN]}:{weight:g}"
        for path, weight in map(parse, specs)
        if weight  # else it changes nothing
    )


def read_all(specs: Iterable[str], shapes: Mapping[str, Shape]) -> list[Weighted]:
    """The adapters ``PATH[:WEIGHT]`` for a model whose weights have ``shapes``.

    Raises:
        InputError, CheckpointError: as for ``parse`` and ``read_adapter``.
    """
    parsed = [parse(spec) for spec in specs]
    return [Weighted(read_adapter(path, shapes), weight) for path, weight in parsed]


def merge(model: DIM, specs: Sequence[str]) -> Merged:
    """Merge adapters into ``model``, in place.

    An adapter that was learnt with ``vlm_view: region`` has the understanding model see just that.

    Args:
        specs: ``PATH[:WEIGHT]`` each; what several change is the sum of their changes.

    Returns:
        What takes them out again.

    Raises:
        InputError, CheckpointError: as for ``read_all``; the model is left as it was.
    """
    config = model.config
    kept: list[tuple[nn.Parameter, Tensor]] = []
    try:
        for pair in _replace(model, specs):
            kept.append(pair)
    except CheckpointError:
        Merged(model, config, tuple(kept)).unmerge()
        raise
    return Merged(model, config, tuple(kept))


def merge_for_good(model: DIM, specs: Sequence[str]) -> None:
    """``merge``, without keeping what it replaces: memory holds one weight twice, not all.

    Raises:
        InputError, CheckpointError: as for ``merge``; the model may be changed in part.
    """
    for _ in _replace(model, specs):
        pass


def _replace(model: DIM, specs: Sequence[str]) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Merge a weight at a time; the parameter and what it was before."""
    named = dict(named_parameters(model))
    adapters = read_all(specs, {name: tuple(each.shape) for name, each in named.items()})
    model.config = _showing(model.config, adapters)
    for name, parameter in named.items():
        base = parameter.data
        if (changed := merged(name, base, adapters)) is not base:
            parameter.data = changed
            yield parameter, base


def merged(name: str, base: Tensor, adapters: Iterable[Weighted]) -> Tensor:
    """The weight ``name`` with ``adapters``, in the type and on the device of ``base``.

    ``base + Σ weight · scale · up @ down``; of an adapter that has the weight itself, the step from
    ``base`` to it counts. Sums are of single precision or better. ``base`` itself where nothing
    changes it.

    Raises:
        CheckpointError: the sum is beyond the type's range.
    """
    wide = torch.promote_types(base.dtype, torch.float32)
    total, rest = None, 1.0
    for adapter, weight in adapters:
        if weight == 0:
            continue
        if (low := adapter.added.get(name)) is not None:
            up, down = (each.to(base.device, wide).flatten(1) for each in (low.up, low.down))
            change = (up @ down).reshape(base.shape) * (low.scale * weight)
        elif (whole := adapter.replaced.get(name)) is not None:
            # base + weight · (whole − base), so that a whole weight at 1 comes out to the bit
            change = whole.to(base.device, wide) * weight
            rest -= weight
        else:
            continue
        total = change if total is None else total + change
    if total is None:
        return base
    changed = (base.to(wide) * rest + total).to(base.dtype)
    if not is_finite(changed):
        raise CheckpointError(f"{name} is no longer finite with these adapters: lower the weights")
    return changed


def merge_folder(
    path: str | Path,
    specs: Sequence[str],
    out: str | Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the DIM folder ``path`` with adapters in its weights as the DIM folder ``out``.

    A tensor at a time; the frozen parts are copied as they are.

    Raises:
        CheckpointError: no such folder, not a DIM, or damaged; an adapter that does not fit; or
            the disk refused.
        InputError: something else than a DIM is at ``out``, or it is ``path`` itself.
    """
    path, out = Path(path), Path(out)
    if path.resolve() == out.resolve():
        raise InputError(f"{out} is the model itself: choose another place for the merged one")
    sources = _sources(path)
    adapters = read_all(specs, _shapes(sources))
    with folder.replacing(out) as staged:
        for name in COPIED:
            _copy(path / name, staged / name)
        _describe(path, staged, adapters)
        (staged / folder.PAINTER).mkdir()
        _copy(path / folder.PAINTER / "config.json", staged / folder.PAINTER / "config.json")
        for prefix, files in sources.items():
            place, stem = PLACES[prefix]
            tensorfile.write_folder(
                staged / place,
                stem,
                files,
                _produce(prefix, files, adapters),
                metadata=files.metadata,
                max_shard_bytes=max_shard_bytes if prefix == TRANSFORMER else sys.maxsize,
            )


def check_folder(path: str | Path, specs: Sequence[str]) -> None:
    """Say what would be wrong with merging adapters into the DIM folder ``path``.

    Raises:
        CheckpointError, InputError: as for ``merge_folder``.
    """
    adapters = read_all(specs, _shapes(_sources(Path(path))))
    _showing(folder.read_description(Path(path)).config, adapters)


def _sources(path: Path) -> dict[str, TensorFiles]:
    """The tensors of a DIM folder that adapters may change, by the prefix of their names."""
    folder.read_description(path)
    return {
        prefix: tensorfile.open_folder(path / place, stem)
        for prefix, (place, stem) in PLACES.items()
    }


def _showing(config: ModelConfig, adapters: Sequence[Weighted]) -> ModelConfig:
    """``config`` with what the adapters' understanding model was shown.

    Raises:
        InputError: one was shown something else than another.
    """
    views = {adapter.vlm_view for adapter, weight in adapters if weight} - {None}
    if len(views) > 1:
        raise InputError("these adapters do not go together: they were learnt with other vlm_views")
    return config.showing(view) if (view := next(iter(views), None)) else config


def _describe(path: Path, staged: Path, adapters: Sequence[Weighted]) -> None:
    """The ``dim.json`` of the merged model: that of ``path``, but for what the adapters change."""
    known = folder.read_description(path).config
    changed = _showing(known, adapters)
    _copy(path / folder.DESCRIPTION, staged / folder.DESCRIPTION)
    if changed != known:
        file = staged / folder.DESCRIPTION
        said = json.loads(file.read_text(encoding="utf-8")) | {"config": dump_config(changed)}
        file.write_text(json.dumps(said, indent=2) + "\n", encoding="utf-8")


def _shapes(sources: Mapping[str, TensorFiles]) -> dict[str, Shape]:
    return {prefix + name: files[name].shape for prefix, files in sources.items() for name in files}


def _produce(prefix: str, files: TensorFiles, adapters: Sequence[Weighted]) -> Produce:
    return lambda name: merged(prefix + name, files.read(name), adapters)


def _copy(source: Path, target: Path) -> None:
    """A file or folder, if there is one."""
    if source.is_dir():
        shutil.copytree(source, target)
    elif source.exists():
        shutil.copy2(source, target)


def named_parameters(model: DIM) -> Iterator[tuple[str, nn.Parameter]]:
    """Every weight that an adapter may change, under the names of ``read_adapter``."""
    for name, parameter in model.painter.network.named_parameters():
        yield TRANSFORMER + name, parameter
    for name, parameter in model.connector.named_parameters():
        yield CONNECTOR + name, parameter
    yield NULL_CONDITION, model.painter.null_condition
