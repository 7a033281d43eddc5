"""An adapter while it is learnt: peft's layers in painter and connector, all else frozen."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from diffusers.loaders.lora_pipeline import SanaLoraLoaderMixin
from diffusers.training_utils import cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from dim.errors import InputError
from dim.model import DIM
from dim.model.lora.adapter import CONNECTOR, MORE_FILE, NULL_CONDITION, PATCH_EMBED, VIEW_KEY
from dim.model.lora.settings import LoraSettings, Part

ADAPTER = "default"  # peft's name of it


class RowDropout(nn.Module):
    """Dropout whose draws are a function of a batch's rows, whoever computes them.

    torch's own draws from a running generator: a run that was interrupted, or had another number
    of workers, would not be the undisturbed one. Here each row has a generator of its own, seeded
    by the row's key and the layer's number.
    """

    def __init__(self, share: float, number: int) -> None:
        super().__init__()
        self.share = share
        self.number = number
        self.keys: list[int] = []  # one a row, see ``key_dropout``

    def forward(self, states: Tensor) -> Tensor:
        """``states`` (B, …) with ``share`` of the numbers zero and the others larger."""
        if not self.training:
            return states
        generator = torch.Generator(states.device)
        rows = []
        for key, row in zip(self.keys, states, strict=True):
            generator.manual_seed(_seed(key, self.number))
            rows.append(torch.rand(row.shape, generator=generator, device=row.device))
        return states * (torch.stack(rows) >= self.share) / (1 - self.share)


def attach(
    model: DIM, settings: LoraSettings, *, seed: int, frozen: torch.dtype | None = None
) -> None:
    """Make ``model`` one that learns an adapter and nothing else, in place.

    What is trained is of single precision. The adapter changes nothing yet: ``lora_B`` is zero.

    Args:
        seed: of the matrices ``lora_A``, which are random.
        frozen: the floating type of the weights that are not trained; default is as they are.

    Raises:
        InputError: a target is no layer's name, is trained as a whole too, or a source latent's
            channels would never be learnt.
    """
    chosen = _chosen(model, settings)
    _check_source(model, settings)
    _insert(model, settings, chosen, seed=seed, frozen=frozen)


def insert(
    model: DIM, settings: LoraSettings, *, seed: int, frozen: torch.dtype | None = None
) -> None:
    """The same for a model whose weights have no values to look at, such as torch's fake tensors.

    Raises:
        InputError: a target is no layer's name, or is trained as a whole too.
    """
    _insert(model, settings, _chosen(model, settings), seed=seed, frozen=frozen)


def _insert(
    model: DIM,
    settings: LoraSettings,
    chosen: Sequence[str],
    *,
    seed: int,
    frozen: torch.dtype | None,
) -> None:
    painter, connector = model.painter, model.connector
    network = painter.network
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        of_painter = [name for name in chosen if not name.startswith(CONNECTOR)]
        network.add_adapter(_peft(settings, of_painter), ADAPTER)
        if of_connector := [x.removeprefix(CONNECTOR) for x in chosen if x.startswith(CONNECTOR)]:
            inject_adapter_in_model(_peft(settings, of_connector), connector, ADAPTER)
    if settings.dropout:
        for number, layer in enumerate(_lora_layers(model)):
            layer.lora_dropout[ADAPTER] = RowDropout(settings.dropout, number)
    for part in settings.train:
        _part(model, part).requires_grad_(True)
    for module in (painter, connector):
        cast_training_params(module, torch.float32)
        for parameter in module.parameters():
            if frozen is not None and not parameter.requires_grad:
                parameter.data = parameter.to(frozen)


def key_dropout(model: DIM, noise: Tensor) -> None:
    """Give the adapter's dropout the rows that come next.

    Args:
        noise: (B, C, h, w) float32 on the CPU, the rows' own. It is a function of seed, step and
            slot, and so is what is dropped.
    """
    keys = noise.flatten(1)[:, :2].contiguous().view(torch.int64)[:, 0].tolist()
    for layer in _lora_layers(model):
        dropout = layer.lora_dropout[ADAPTER]
        if isinstance(dropout, RowDropout):
            dropout.keys = keys


def save(model: DIM, settings: LoraSettings, folder: Path) -> None:
    """Write what ``attach`` put into ``model``, and was trained since, as an adapter's files.

    ``dim.model.lora.adapter`` says what they are; diffusers' ``load_lora_weights`` reads the first.

    Raises:
        OSError: the disk refused.
    """
    network, connector = model.painter.network, model.connector
    SanaLoraLoaderMixin.save_lora_weights(
        folder,
        transformer_lora_layers=_lora_weights(network),
        transformer_lora_adapter_metadata=_metadata(settings, network),
    )
    more = {}
    metadata = {"format": "pt"}
    if hasattr(connector, "peft_config"):
        more = {CONNECTOR + name: each for name, each in _lora_weights(connector).items()}
        said = {CONNECTOR + key: value for key, value in _metadata(settings, connector).items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(said, indent=2, sort_keys=True)
    for part in settings.train:
        more |= {name: _to_file(each) for name, each in _whole(model, part).items()}
    if (view := model.config.understanding.vlm_view) != "whole":
        metadata[VIEW_KEY] = view
    if more or VIEW_KEY in metadata:
        save_file(more, folder / MORE_FILE, metadata=metadata)


def _layers(model: DIM) -> Iterator[str]:
    """The layers that may have a LoRA: the network's own names, and ``connector.…``.

    No depthwise convolution, of which peft merges none. Not the patch embedding: a LoRA of an edit
    painter's, which sees a source latent, would fit no other SANA.
    """
    for name, layer in model.painter.network.named_modules():
        plain = isinstance(layer, nn.Conv2d) and layer.groups == 1
        if (plain or isinstance(layer, nn.Linear)) and not name.startswith("patch_embed."):
            yield name
    for name, layer in model.connector.named_modules():
        if isinstance(layer, nn.Linear):
            yield CONNECTOR + name


def _chosen(model: DIM, settings: LoraSettings) -> list[str]:
    """The layers of ``settings.targets``, each once.

    Raises:
        InputError: as for ``attach``.
    """
    layers = list(_layers(model))
    found = {
        target: [name for name in layers if f".{target}." in f".{name}."]
        for target in settings.targets
    }
    if lost := [target for target, names in found.items() if not names]:
        there = dict.fromkeys(re.sub(r"^transformer_blocks\.\d+\.", "", name) for name in layers)
        raise InputError(
            f"lora.targets: no layer is called {', '.join(lost)}; there are {', '.join(there)} "
            f"(patch_embed can be trained as a whole: lora.train)"
        )
    chosen = sorted({name for names in found.values() for name in names})
    of_connector = [name for name in chosen if name.startswith(CONNECTOR)]
    if len(of_connector) == len(chosen):
        raise InputError("lora.targets: name a layer of the painter too, such as to_q")
    if of_connector and "connector" in settings.train:
        raise InputError("connector is in lora.train and in lora.targets: choose one of them")
    return chosen


def _check_source(model: DIM, settings: LoraSettings) -> None:
    """Refuse an adapter that leaves the source latent's channels as they are, all zero."""
    painter = model.painter
    if not painter.takes_source or "patch_embed" in settings.train:
        return
    if not painter.network.patch_embed.proj.weight[:, painter.latent_channels :].any():
        raise InputError(
            "the painter was made for text-to-image and sees nothing of a source yet: put "
            "patch_embed into lora.train, or begin with an edit model"
        )


def _peft(settings: LoraSettings, layers: list[str]) -> LoraConfig:
    return LoraConfig(r=settings.rank, lora_alpha=settings.scaled_by, target_modules=layers)


def _lora_layers(model: DIM) -> Iterator[LoraLayer]:
    for module in (model.connector, model.painter):
        for layer in module.modules():
            if isinstance(layer, LoraLayer):
                yield layer


def _part(model: DIM, part: Part) -> nn.Module | nn.Parameter:
    if part == "null_condition":
        return model.painter.null_condition
    return model.connector if part == "connector" else model.painter.network.patch_embed


def _whole(model: DIM, part: Part) -> Mapping[str, Tensor]:
    """The weights of a part that is trained as a whole, under an adapter's names."""
    module = _part(model, part)
    if isinstance(module, nn.Parameter):
        return {NULL_CONDITION: module}
    prefix = CONNECTOR if part == "connector" else PATCH_EMBED
    return {prefix + name: each for name, each in module.named_parameters()}


def _lora_weights(module: nn.Module) -> dict[str, Tensor]:
    weights = get_peft_model_state_dict(module, adapter_name=ADAPTER)
    return {name: _to_file(each) for name, each in sorted(weights.items())}


def _to_file(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu().contiguous()


def _metadata(settings: LoraSettings, module: nn.Module) -> dict[str, object]:
    """What a reader needs of ``peft.LoraConfig``; all of it would tie the file to one version."""
    layers = sorted(name for name, layer in module.named_modules() if isinstance(layer, LoraLayer))
    return {"r": settings.rank, "lora_alpha": settings.scaled_by, "target_modules": layers}


def _seed(key: int, number: int) -> int:
    """A generator's seed for a row's key (any int64) and a layer's number."""
    entropy = [key & 0xFFFFFFFFFFFFFFFF, number]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))
