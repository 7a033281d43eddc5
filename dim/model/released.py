"""The published layout: SANA's own tensor names behind DIM's prefixes, and what they tell."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from torch import Tensor, nn

from dim.errors import CheckpointError
from dim.model.checkpoint.finite import is_finite, refuse_not_finite, require_finite
from dim.model.checkpoint.tensorfile import FLOATS, Shape, Spec, TensorFiles, open_folder
from dim.model.config import Task
from dim.model.connector import Connector
from dim.model.painter import Painter

CONNECTOR = "projector."
PAINTER = "decoder.model."
NULL_TABLE = "decoder.model.y_embedder.y_embedding"
AUTOENCODER = "decoder.vae."
UNDERSTANDING = "mllm."
# A table of positions that the published network holds but does not use.
UNUSED = "decoder.model.pos_embed"
# A frozen part of SANA that DIM does not use.
TEXT_ENCODER = "decoder.text_encoder."
SECTIONS = (CONNECTOR, PAINTER, AUTOENCODER, UNDERSTANDING, TEXT_ENCODER)
VIEW = "vlm_view"  # in a header, of a checkpoint that was not trained as published
STEM = "model"

HEAD_DIM = 32
CROSS_HEAD_DIM = 112

TASKS: dict[Task, str] = {"edit": "an edit", "t2i": "a text-to-image"}

# published name → diffusers names. More than one: the published tensor holds them stacked.
RENAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("x_embedder.proj", ("patch_embed.proj",)),
    ("t_embedder.mlp.0", ("time_embed.emb.timestep_embedder.linear_1",)),
    ("t_embedder.mlp.2", ("time_embed.emb.timestep_embedder.linear_2",)),
    ("t_block.1", ("time_embed.linear",)),
    ("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
    ("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
    ("attention_y_norm", ("caption_norm",)),
    ("final_layer.linear", ("proj_out",)),
    ("final_layer.scale_shift_table", ("scale_shift_table",)),
)
BLOCK_RENAMES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("scale_shift_table", ("scale_shift_table",)),
    ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn.q_norm", ("attn1.norm_q",)),
    ("attn.k_norm", ("attn1.norm_k",)),
    ("attn.proj", ("attn1.to_out.0",)),
    ("cross_attn.q_linear", ("attn2.to_q",)),
    ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    ("cross_attn.q_norm", ("attn2.norm_q",)),
    ("cross_attn.k_norm", ("attn2.norm_k",)),
    ("cross_attn.proj", ("attn2.to_out.0",)),
    ("mlp.inverted_conv.conv", ("ff.conv_inverted",)),
    ("mlp.depth_conv.conv", ("ff.conv_depth",)),
    ("mlp.point_conv.conv", ("ff.conv_point",)),
)
# The tensors whose shapes decide every size, with their number of dimensions.
DECISIVE = {
    "projector.0.weight": 2,
    "decoder.model.x_embedder.proj.weight": 4,
    "decoder.model.blocks.0.mlp.point_conv.conv.weight": 4,
    "decoder.model.final_layer.linear.weight": 2,
    "decoder.model.y_embedder.y_proj.fc1.weight": 2,
    NULL_TABLE: 2,
}
# Sizes that stand in for unknown ones: which names there must be does not depend on them.
STAND_IN = {
    "in_channels": 1,
    "out_channels": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 1,
    "num_cross_attention_heads": 1,
    "cross_attention_head_dim": 1,
    "cross_attention_dim": 1,
    "caption_channels": 1,
    "mlp_ratio": 1.0,
    "patch_size": 1,
}


class Place(NamedTuple):
    """Where a tensor of diffusers' network lies: the ``part``-th of ``parts`` in a published one.

    The parts are stacked on the first axis.
    """

    name: str
    part: int
    parts: int


@dataclass(frozen=True)
class Layout:
    """What a published checkpoint's shapes say.

    ``architecture``: arguments of ``SanaTransformer2DModel``. ``hidden_size``: features of a token
    that the connector takes. ``places``: where each tensor of diffusers' network lies.
    """

    architecture: dict[str, Any]
    hidden_size: int
    null_condition_tokens: int
    places: dict[str, Place]

    @property
    def condition_features(self) -> int:
        """Features of a condition token."""
        return self.architecture["caption_channels"]

    @property
    def latent_channels(self) -> int:
        """Channels of one latent."""
        return self.architecture["out_channels"]

    @property
    def task(self) -> Task:
        """Whether the painter sees a source latent."""
        return "t2i" if self.architecture["in_channels"] == self.latent_channels else "edit"


def load(
    path: str | Path,
    *,
    attention_head_dim: int = HEAD_DIM,
    cross_attention_head_dim: int = CROSS_HEAD_DIM,
    task: Task | None = None,
) -> tuple[Connector, Painter]:
    """Connector and painter of a checkpoint with the published names.

    Args:
        path: the safetensors file, or the folder that holds ``model.safetensors`` or its shards.
            Only the tensors of connector and painter are read.
        attention_head_dim: features of a head in self-attention; not to be seen in any shape.
        cross_attention_head_dim: the same in cross-attention.
        task: what the checkpoint must be for; None takes either.

    Returns:
        Both in evaluation mode, in the file's floating type. Every size comes from the shapes: an
        edit checkpoint gives an edit painter.

    Raises:
        CheckpointError: no such file, not a safetensors file, made for another task, weights that
            are not finite, or tensors are missing, unexpected or of a wrong shape; the message
            lists them.
    """
    files = open_checkpoint(path)
    layout = require_layout(
        str(path), *read_layout(files, attention_head_dim, cross_attention_head_dim)
    )
    require_task(str(path), layout, task)
    with torch.device("meta"):
        connector = Connector(layout.hidden_size, layout.condition_features)
        network = SanaTransformer2DModel(**layout.architecture)
    connector_places = {name: Place(CONNECTOR + name, 0, 1) for name in connector.state_dict()}
    _fill(connector, connector_places, files, str(path))
    _fill(network, layout.places, files, str(path))
    null_condition = files.read(NULL_TABLE)
    require_finite(str(path), {NULL_TABLE: null_condition})
    return connector.eval(), Painter(network, null_condition).eval()


def open_checkpoint(path: str | Path) -> TensorFiles:
    """The headers of a published checkpoint: a safetensors file, or the folder that holds one.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    path = Path(path)
    return open_folder(path, STEM) if path.is_dir() else TensorFiles([path])


def read_layout(
    specs: Mapping[str, Spec],
    attention_head_dim: int = HEAD_DIM,
    cross_attention_head_dim: int = CROSS_HEAD_DIM,
) -> tuple[Layout | None, list[str]]:
    """The layout of connector and painter, and every problem with their tensors, a phrase each.

    Tensors of other parts are not looked at. Without a layout there are problems.
    """
    mine = {name: specs[name] for name in specs if name.startswith((CONNECTOR, PAINTER))}
    shapes = {name: specs[name].shape for name in DECISIVE if name in specs}
    misshapen = _wrong_dimensions(shapes)
    problems = wrong_types(mine) + misshapen
    mine.pop(UNUSED, None)
    sizes = None
    if len(shapes) == len(DECISIVE) and not misshapen:
        sizes = _sizes(shapes, attention_head_dim, cross_attention_head_dim)
        if impossible := _impossible(sizes):
            problems += impossible
            sizes = None
    architecture = (sizes or STAND_IN) | _switches(mine)
    with torch.device("meta"):
        network = SanaTransformer2DModel(**architecture)
    if sizes is None:
        return None, problems + compare(mine, dict.fromkeys(published_shapes(network, 1, 1)))
    hidden_size, rows = shapes["projector.0.weight"][1], shapes[NULL_TABLE][0]
    problems += compare(mine, published_shapes(network, hidden_size, rows))
    places = {name: published_place(name) for name in network.state_dict()}
    return Layout(architecture, hidden_size, rows, places), problems


def compare(found: Mapping[str, Spec], expected: Mapping[str, Shape | None]) -> list[str]:
    """What is missing, unexpected or of a wrong shape in ``found``, a phrase each.

    An expected shape of None is any.
    """
    problems = [f"missing {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected {name}" for name in sorted(found.keys() - expected.keys())]
    return problems + [
        f"{name} is {found[name].shape}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] not in (None, found[name].shape)
    ]


def wrong_types(specs: Mapping[str, Spec]) -> list[str]:
    """The tensors in ``specs`` that are of no floating type, a phrase each."""
    return [
        f"{name} is of type {spec.dtype}, which is not one of {', '.join(FLOATS)}"
        for name, spec in sorted(specs.items())
        if spec.dtype not in FLOATS
    ]


def require_layout(where: str, layout: Layout | None, problems: list[str]) -> Layout:
    """``layout``, if there are no ``problems``.

    Raises:
        CheckpointError: there are; the message lists them all.
    """
    if problems or layout is None:
        raise CheckpointError(f"{where}: {'; '.join(problems)}")
    return layout


def require_task(where: str, layout: Layout, task: Task | None) -> None:
    """Refuse a checkpoint of another task than ``task``; None takes either.

    Raises:
        CheckpointError: the checkpoint's input channels are those of the other task.
    """
    if task is None or layout.task == task:
        return
    raise CheckpointError(
        f"{where} is {TASKS[layout.task]} checkpoint ({layout.architecture['in_channels']} input "
        f"channels for latents of {layout.latent_channels}), where {TASKS[task]} one is expected"
    )


def published_place(name: str) -> Place:
    """Where the tensor ``name`` of diffusers' network lies in a published checkpoint.

    Raises:
        CheckpointError: the published network has no such tensor.
    """
    block = re.match(r"transformer_blocks\.(\d+)\.(.*)", name)
    prefix, rest, table = ("", name, RENAMES)
    if block:
        prefix, rest, table = (f"blocks.{block[1]}.", block[2], BLOCK_RENAMES)
    for published, targets in table:
        for part, target in enumerate(targets):
            ending = rest.removeprefix(target)
            if rest.startswith(target) and ending in ("", ".weight", ".bias"):
                return Place(f"{PAINTER}{prefix}{published}{ending}", part, len(targets))
    raise CheckpointError(f"the published layout has no place for the painter's {name}")


def read_place(files: TensorFiles, place: Place) -> Tensor:
    """The tensor that lies at ``place``, in memory of its own."""
    if place.parts == 1:
        return files.read(place.name)
    rows = files[place.name].shape[0] // place.parts
    return files.read(place.name, slice(place.part * rows, (place.part + 1) * rows))


def _fill(module: nn.Module, places: Mapping[str, Place], files: TensorFiles, where: str) -> None:
    tensors = {name: read_place(files, place) for name, place in places.items()}
    refuse_not_finite(where, {places[k].name: None for k, v in tensors.items() if not is_finite(v)})
    module.load_state_dict(tensors, assign=True)


def _wrong_dimensions(shapes: Mapping[str, Shape]) -> list[str]:
    return [
        f"{name} is {shape}, not {DECISIVE[name]} sizes above zero"
        for name, shape in shapes.items()
        if len(shape) != DECISIVE[name] or 0 in shape
    ]


def _sizes(shapes: Mapping[str, Shape], head_dim: int, cross_head_dim: int) -> dict[str, Any]:
    """The sizes among diffusers' constructor arguments, from the decisive shapes."""
    inner, in_channels, patch, _ = shapes["decoder.model.x_embedder.proj.weight"]
    hidden = shapes["decoder.model.blocks.0.mlp.point_conv.conv.weight"][1]
    return {
        "in_channels": in_channels,
        "out_channels": shapes["decoder.model.final_layer.linear.weight"][0] // patch**2,
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "num_cross_attention_heads": inner // cross_head_dim,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": inner,
        "caption_channels": shapes["decoder.model.y_embedder.y_proj.fc1.weight"][1],
        "mlp_ratio": _ratio(hidden, inner),
        "patch_size": patch,
    }


def _impossible(sizes: Mapping[str, Any]) -> list[str]:
    """Sizes that no painter can have, a phrase each."""
    inner, channels = sizes["cross_attention_dim"], sizes["out_channels"]
    problems = [
        f"width {inner} has no {name} heads of {sizes[size]} features"
        for name, size in (
            ("attention", "attention_head_dim"),
            ("cross-attention", "cross_attention_head_dim"),
        )
        if inner % sizes[size]
    ]
    if sizes["in_channels"] not in (channels, 2 * channels):
        problems.append(
            f"the patch embedding takes {sizes['in_channels']} channels for latents of {channels}, "
            f"neither as many nor twice as many"
        )
    return problems


def _switches(painter: Mapping[str, Spec]) -> dict[str, Any]:
    """diffusers' other constructor arguments, from the names that there are."""
    blocks = (re.match(r"decoder\.model\.blocks\.(\d+)\.", name) for name in painter)
    return {
        "num_layers": max((int(block[1]) for block in blocks if block), default=0) + 1,
        "attention_bias": any(name.endswith(".attn.qkv.bias") for name in painter),
        "qk_norm": "rms_norm_across_heads" if any("q_norm" in name for name in painter) else None,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def _ratio(hidden: int, inner: int) -> float:
    """The number whose product with ``inner`` truncates to ``hidden``."""
    ratio = hidden / inner
    return ratio if int(ratio * inner) == hidden else (hidden + 0.5) / inner


def published_shapes(
    network: SanaTransformer2DModel, hidden_size: int, null_condition_tokens: int
) -> dict[str, Shape]:
    """The tensors of connector and painter that a published checkpoint of ``network`` has."""
    features = network.config["caption_channels"]
    shapes = {
        NULL_TABLE: (null_condition_tokens, features),
        "projector.0.weight": (features, hidden_size),
        "projector.0.bias": (features,),
        "projector.2.weight": (features, features),
        "projector.2.bias": (features,),
    }
    for name, tensor in network.state_dict().items():
        place = published_place(name)
        shapes[place.name] = (tensor.shape[0] * place.parts, *tensor.shape[1:])
    return shapes
