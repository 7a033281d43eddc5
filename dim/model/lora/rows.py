"""Adapters by name, of which each image of a batch has its own, or none.

Unlike in ``dim.model.lora.merge`` the model's weights stay as they are. What an adapter adds is
computed beside the layers that it changes, row by row, so that an image does not depend on what is
painted beside it, nor with which adapters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn import functional

from dim.errors import InputError
from dim.model.config import VlmView
from dim.model.lora.adapter import CONNECTOR, NULL_CONDITION, TRANSFORMER, read_adapter
from dim.model.lora.merge import Weighted, merged, named_parameters, parse

if TYPE_CHECKING:
    from dim.model.dim import DIM

# What sees each latent once, before the branches of guidance part: see ``Painter``.
_EARLY = ("time_embed.", "patch_embed.", "transformer_blocks.0.attn1.")


@dataclass(frozen=True)
class LowRankLayer:
    """What is added to a layer's output: ``up`` of ``down`` of its input, the scale in ``up``."""

    down: Tensor
    up: Tensor

    def onto(self, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        """Add to ``output``, which ``layer`` made of ``given``; one row each."""
        if isinstance(layer, nn.Conv2d):
            low = functional.conv2d(given, self.down, None, layer.stride, layer.padding)
            output += functional.conv2d(low, self.up)
        else:
            output += functional.linear(functional.linear(given, self.down), self.up)


@dataclass(frozen=True)
class WholeLayer:
    """A layer's weights in place of the model's."""

    weight: Tensor
    bias: Tensor | None

    def onto(self, layer: nn.Module, given: Tensor, output: Tensor) -> None:
        """Replace ``output``, which ``layer`` made of ``given``; one row each."""
        if isinstance(layer, nn.Conv2d):
            output.copy_(
                functional.conv2d(given, self.weight, self.bias, layer.stride, layer.padding)
            )
        else:
            output.copy_(functional.linear(given, self.weight, self.bias))


@dataclass(frozen=True)
class NamedAdapter:
    """An adapter on the model's device.

    ``layers``: name of a layer → what becomes of its output. ``null_condition``: in place of the
    painter's. ``vlm_view``: see ``Adapter``. ``bytes``: of memory that it takes.
    """

    name: str
    layers: Mapping[str, LowRankLayer | WholeLayer]
    null_condition: Tensor | None
    vlm_view: VlmView | None
    bytes: int


class Adapters:
    """The named adapters of a model. Not for several threads at once.

    Args:
        model: its layers get forward hooks; without a chosen adapter they do nothing.
        specs: name → ``PATH[:WEIGHT]``; all of them are loaded here.

    Raises:
        CheckpointError, InputError: as for ``dim.model.lora.merge.read_all``.
    """

    def __init__(self, model: DIM, specs: Mapping[str, str]) -> None:
        # Weak, or a model with adapters would hold on to itself, and to a device's memory.
        self._model = weakref.ref(model)
        self._named = {name: _load(model, name, spec) for name, spec in specs.items()}
        # Of the pass that is being made: the adapter of every row, before and after branches part.
        self._early: Sequence[NamedAdapter | None] = ()
        self._late: Sequence[NamedAdapter | None] = ()
        self._all: NamedAdapter | None = None
        self._seen: dict[str, int] = {}  # rows of this pass that a layer has had by now
        for name, layer in _layers(model):
            if any(name in each.layers for each in self._named.values()):
                layer.register_forward_hook(self._hook(name))

    @property
    def bytes(self) -> dict[str, int]:
        """How much memory each of them takes, by name."""
        return {name: each.bytes for name, each in self._named.items()}

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """All that is computed of the model in the block is with this adapter.

        Raises:
            InputError: there is none of this name.
        """
        if name is None:
            yield
            return
        model, adapter = self._model(), self._find(name)
        assert model is not None
        config, table = model.config, model.painter.null_condition.data
        self._all = adapter
        if adapter.null_condition is not None:
            model.painter.null_condition.data = adapter.null_condition
        if adapter.vlm_view is not None:
            model.config = config.showing(adapter.vlm_view)
        try:
            yield
        finally:
            self._all = None
            model.painter.null_condition.data = table
            model.config = config

    @contextmanager
    def rows(self, names: Sequence[str | None], branches: Sequence[int]) -> Iterator[None]:
        """The painter's pass in the block is of latents with these adapters.

        Args:
            names: one a latent.
            branches: how many rows each latent becomes.
        """
        if any(name is not None for name in names):
            early = [None if name is None else self._find(name) for name in names]
            pairs = zip(early, branches, strict=True)
            self._early, self._late = early, [one for one, count in pairs for _ in range(count)]
        self._seen = {}
        try:
            yield
        finally:
            self._early = self._late = ()

    def _find(self, name: str) -> NamedAdapter:
        if name not in self._named:
            raise InputError(f"no adapter {name!r}; there are: {', '.join(self._named) or 'none'}")
        return self._named[name]

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        early = name.removeprefix(TRANSFORMER).startswith(_EARLY)

        def after(layer: nn.Module, given: tuple[Tensor], output: Tensor) -> None:
            for row, adapter in enumerate(self._of_rows(name, early, len(output))):
                change = None if adapter is None else adapter.layers.get(name)
                if change is not None:
                    change.onto(layer, given[0][row : row + 1], output[row : row + 1])

        return after

    def _of_rows(self, name: str, early: bool, count: int) -> Sequence[NamedAdapter | None]:
        """The adapters of the ``count`` rows that a layer has now."""
        if self._all is not None:
            return [self._all] * count
        if early:
            return self._early[:count]  # what is behind them fills up and is thrown away
        # The feed-forward layers see a few rows at a time, in order.
        start = self._seen.get(name, 0)
        self._seen[name] = start + count
        return self._late[start : start + count]


def _load(model: DIM, name: str, spec: str) -> NamedAdapter:
    named = dict(named_parameters(model))
    path, weight = parse(spec)
    adapter = read_adapter(path, {key: tuple(each.shape) for key, each in named.items()})
    layers: dict[str, LowRankLayer | WholeLayer] = {}
    for key, low in adapter.added.items():
        like, scale = named[key], low.scale * weight
        down, up = low.down, low.up * scale
        if down.ndim == 4:
            up = up.reshape(*up.shape[:2], 1, 1)
        layers[key.removesuffix(".weight")] = LowRankLayer(down.to(like), up.to(like))
    whole = {
        key: merged(key, named[key].data, [Weighted(adapter, weight)]) for key in adapter.replaced
    }
    table = whole.pop(NULL_CONDITION, None)
    for layer in {key.rpartition(".")[0] for key in whole}:
        layers[layer] = WholeLayer(whole[f"{layer}.weight"], whole.get(f"{layer}.bias"))
    tensors = [table] if table is not None else []
    for change in layers.values():
        tensors += [each for each in vars(change).values() if each is not None]
    size = sum(each.numel() * each.element_size() for each in tensors)
    return NamedAdapter(name, layers, table, adapter.vlm_view if weight else None, size)


def _layers(model: DIM) -> Iterator[tuple[str, nn.Module]]:
    """Every layer that an adapter may change, under the names of its weights."""
    for prefix, part in ((TRANSFORMER, model.painter.network), (CONNECTOR, model.connector)):
        for name, layer in part.named_modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                yield prefix + name, layer
