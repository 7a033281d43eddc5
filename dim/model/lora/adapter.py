"""An adapter in files: diffusers' LoRA of the painter, and beside it what that has no place for.

A folder holds two safetensors files. ``pytorch_lora_weights.safetensors`` is diffusers' own:
``transformer.LAYER.lora_A.weight`` and ``…lora_B.weight``, with rank and alpha in the header.
``dim_adapter.safetensors`` is there if more was trained: the connector's LoRA
(``connector.0.lora_A.weight``, …) or its weights (``connector.0.weight``, …), the null table
(``null_condition``) and the patch embedding (``transformer.patch_embed.proj.weight``, ``….bias``).
Of an adapter that was learnt with ``vlm_view: region`` its header says so.

Pickles are never read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor

from dim.errors import CheckpointError
from dim.model import released
from dim.model.checkpoint.finite import require_finite
from dim.model.checkpoint.tensorfile import Shape, Spec, TensorFiles
from dim.model.config import VlmView

LORA_FILE = LORA_WEIGHT_NAME_SAFE
MORE_FILE = "dim_adapter.safetensors"
VIEW_KEY = "dim.vlm_view"  # in the header of ``MORE_FILE``
# What stands in front of a weight's name: diffusers' word for the painter's network, and ours.
TRANSFORMER = "transformer."
CONNECTOR = "connector."
NULL_CONDITION = "null_condition"
PATCH_EMBED = f"{TRANSFORMER}patch_embed."
DOWN, UP = ".lora_A.weight", ".lora_B.weight"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
# peft takes patterns for regular expressions. What diffusers writes are names, and a name is all
# that is taken from a file of somebody else's.
_NAME = re.compile(r"\^?[\w.]+")


@dataclass(frozen=True)
class LowRank:
    """A change that is added to a weight: ``scale · up @ down``.

    ``down`` (rank, in) and ``up`` (out, rank); a convolution's have its kernel's axes behind.
    """

    down: Tensor
    up: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """What an adapter does: weight's name → what is added to it, or what takes its place.

    ``vlm_view``: what the understanding model was shown while it was learnt, if it says so.
    """

    added: dict[str, LowRank]
    replaced: dict[str, Tensor]
    vlm_view: VlmView | None = None


class _Settings(BaseModel):
    """What scales a LoRA, of all that ``peft.LoraConfig`` has and diffusers writes."""

    r: Annotated[int, Field(gt=0)]
    lora_alpha: Positive
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, Positive] = {}

    def scale(self, layer: str, rank: int) -> float:
        """The factor of ``layer``, whose matrices have ``rank``."""
        alpha = _matching(self.alpha_pattern, layer, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def rank(self, layer: str) -> int:
        """The rank that ``layer`` is said to have."""
        return int(_matching(self.rank_pattern, layer, self.r))


def read_adapter(path: Path, shapes: Mapping[str, Shape]) -> Adapter:
    """Read an adapter for a model whose weights have ``shapes``.

    Args:
        path: the folder, or diffusers' file, in which case ``dim_adapter.safetensors`` is read too
            if it lies beside it.
        shapes: every weight of the painter's network (``transformer.…``), the connector
            (``connector.…``) and the null table (``null_condition``).

    Raises:
        CheckpointError: there is none, it is no safetensors file, or it does not fit the model;
            the message names file and key.
    """
    added: dict[str, LowRank] = {}
    replaced: dict[str, Tensor] = {}
    view: VlmView | None = None
    for file in _files(path):
        tensors = TensorFiles([file])
        _check(file, tensors, shapes)
        weights = {name: tensors.read(name) for name in tensors}
        require_finite(str(file), weights)
        view = _view(file, tensors) or view
        settings = {part: _settings(file, tensors, part) for part in (TRANSFORMER, CONNECTOR)}
        for key, tensor in weights.items():
            if key.endswith(DOWN):
                weight = weight_of(key)
                scale = _scale(file, settings, weight, len(tensor))
                added[weight] = LowRank(tensor, weights[key.removesuffix(DOWN) + UP], scale)
            elif not key.endswith(UP):
                replaced[key] = tensor
    return Adapter(added, replaced, view)


def weight_of(key: str) -> str:
    """The weight that the LoRA tensor ``key`` changes; any other key is a weight's name itself."""
    for ending in (DOWN, UP):
        if key.endswith(ending):
            return key.removesuffix(ending) + ".weight"
    return key


def _files(path: Path) -> list[Path]:
    """The files of the adapter at ``path``."""
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        pickles = [each.name for each in path.glob("*.bin")] if path.is_dir() else []
        more = f"; {pickles[0]} is a pickle, which is never read" if pickles else ""
        raise CheckpointError(f"LoRA adapter not found: {file}{more}")
    beside = file.with_name(MORE_FILE)
    return [file, beside] if file.name == LORA_FILE and beside.is_file() else [file]


def _check(file: Path, tensors: TensorFiles, shapes: Mapping[str, Shape]) -> None:
    """Refuse keys, ranks and shapes that are not those of an adapter for ``shapes``."""
    if not tensors and not (file.name == MORE_FILE and VIEW_KEY in tensors.metadata):
        raise CheckpointError(f"{file} is empty: it holds no LoRA")
    if unknown := [key for key in tensors if not _is_known(file, key, shapes)]:
        others = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise CheckpointError(
            f"{file}: {unknown[0]}{others}: not an adapter's key for this model, whose layers are "
            f"changed by {TRANSFORMER}LAYER{DOWN} and {UP.removeprefix('.')}"
        )
    if wrong := released.wrong_types(tensors):
        raise CheckpointError(f"{file}: {wrong[0]}")
    for key in sorted(tensors):
        if key.endswith((DOWN, UP)):
            _check_pair(file, key, tensors, shapes[weight_of(key)])
        elif tensors[key].shape != shapes[key]:
            raise CheckpointError(f"{file}: {key} is {tensors[key].shape}, not {shapes[key]}")
    for part in (CONNECTOR, PATCH_EMBED):
        whole = {key for key in tensors if key.startswith(part) and not key.endswith((DOWN, UP))}
        wanted = {name for name in shapes if name.startswith(part)}
        if whole and (missing := sorted(wanted - whole)):
            raise CheckpointError(f"{file}: missing {missing[0]}, beside {min(whole)}")


def _is_known(file: Path, key: str, shapes: Mapping[str, Shape]) -> bool:
    if file.name == MORE_FILE:
        prefixes = (CONNECTOR, NULL_CONDITION, PATCH_EMBED)
        return key.startswith(prefixes) and weight_of(key) in shapes
    return key.startswith(TRANSFORMER) and key.endswith((DOWN, UP)) and weight_of(key) in shapes


def _check_pair(file: Path, key: str, tensors: Mapping[str, Spec], shape: Shape) -> None:
    """Refuse a LoRA tensor without its other half, of another rank, or for another shape."""
    layer = key.removesuffix(DOWN).removesuffix(UP)
    for half in (layer + DOWN, layer + UP):
        if half not in tensors:
            raise CheckpointError(f"{file}: missing {half}, beside {key}")
    down, up = tensors[layer + DOWN].shape, tensors[layer + UP].shape
    if len(down) != len(shape) or len(up) != len(shape) or down[0] != up[1]:
        raise CheckpointError(
            f"{file}: {layer}: lora_A {down} and lora_B {up} have no common rank for {shape}"
        )
    if down[1:] != shape[1:] or up[0] != shape[0] or math.prod(up[2:]) != 1:
        raise CheckpointError(
            f"{file}: {layer}: lora_A {down} and lora_B {up} do not make the model's {shape}"
        )


def _settings(file: Path, tensors: TensorFiles, part: str) -> _Settings | None:
    """What the header says of ``part``; None where it says nothing, as older files do."""
    text = tensors.metadata.get(LORA_ADAPTER_METADATA_KEY)
    if text is None:
        return None
    try:
        said: dict[str, Any] = json.loads(text)
        mine = {key.removeprefix(part): v for key, v in said.items() if key.startswith(part)}
        return _Settings.model_validate(mine) if mine else None
    except ValidationError as error:
        key = ".".join(map(str, error.errors()[0]["loc"]))
        reason = f"{part}{key}: {error.errors()[0]['msg']}"
    except (ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())
    raise CheckpointError(f"{file}: {LORA_ADAPTER_METADATA_KEY} in its header: {reason}")


def _view(file: Path, tensors: TensorFiles) -> VlmView | None:
    """What the understanding model was shown, if the header says it."""
    said = tensors.metadata.get(VIEW_KEY) if file.name == MORE_FILE else None
    if said is not None and said not in get_args(VlmView):
        raise CheckpointError(f"{file}: {VIEW_KEY} in its header: {said!r} is not known")
    return cast(VlmView | None, said)


def _scale(file: Path, settings: Mapping[str, _Settings | None], weight: str, rank: int) -> float:
    """The factor of a weight's LoRA; 1 where no alpha is known, as for diffusers."""
    part = TRANSFORMER if weight.startswith(TRANSFORMER) else CONNECTOR
    mine = settings[part]
    if mine is None:
        return 1.0
    layer = weight.removeprefix(part).removesuffix(".weight")
    try:
        said = mine.rank(layer)
        if said != rank:
            raise ValueError(f"the header says rank {said}, the tensor has {rank}")
        return mine.scale(layer, rank)
    except ValueError as error:
        raise CheckpointError(f"{file}: {part}{layer}{DOWN}: {error}") from None


def _matching(patterns: Mapping[str, float], layer: str, default: float) -> float:
    """The value of the first pattern that is ``layer`` or, without ``^``, its end."""
    for pattern, value in patterns.items():
        if not _NAME.fullmatch(pattern):
            raise ValueError(f"{pattern!r} in the header is no layer's name")
        name = pattern.removeprefix("^")
        if layer == name or (name == pattern and layer.endswith(f".{name}")):
            return value
    return default
