"""Read checkpoints in the published layout: SANA's own tensor names behind DIM's prefixes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import SanaTransformer2DModel
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dim.errors import CheckpointError
from dim.model.checks import require_finite
from dim.model.connector import Connector
from dim.model.painter import Painter

CONNECTOR = "projector."
PAINTER = "decoder.model."
NULL_TABLE = "y_embedder.y_embedding"
# Names that a checkpoint may carry besides: the frozen parts, and a table of positions that the
# published network holds but does not use.
UNUSED = ("pos_embed",)

# published name → diffusers name. A tuple on the right: the tensor holds several, stacked.
RENAMES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("x_embedder.proj", "patch_embed.proj"),
    ("t_embedder.mlp.0", "time_embed.emb.timestep_embedder.linear_1"),
    ("t_embedder.mlp.2", "time_embed.emb.timestep_embedder.linear_2"),
    ("t_block.1", "time_embed.linear"),
    ("y_embedder.y_proj.fc1", "caption_projection.linear_1"),
    ("y_embedder.y_proj.fc2", "caption_projection.linear_2"),
    ("attention_y_norm", "caption_norm"),
    ("final_layer.linear", "proj_out"),
    ("final_layer.scale_shift_table", "scale_shift_table"),
)
BLOCK_RENAMES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("scale_shift_table", "scale_shift_table"),
    ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v")),
    ("attn.q_norm", "attn1.norm_q"),
    ("attn.k_norm", "attn1.norm_k"),
    ("attn.proj", "attn1.to_out.0"),
    ("cross_attn.q_linear", "attn2.to_q"),
    ("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    ("cross_attn.q_norm", "attn2.norm_q"),
    ("cross_attn.k_norm", "attn2.norm_k"),
    ("cross_attn.proj", "attn2.to_out.0"),
    ("mlp.inverted_conv.conv", "ff.conv_inverted"),
    ("mlp.depth_conv.conv", "ff.conv_depth"),
    ("mlp.point_conv.conv", "ff.conv_point"),
)


def load(
    path: str | Path, *, attention_head_dim: int = 32, cross_attention_head_dim: int = 112
) -> tuple[Connector, Painter]:
    """Connector and painter of a checkpoint with the published names.

    Args:
        path: the safetensors file, or the folder that holds it as ``model.safetensors``. Only the
            tensors of connector and painter are read.
        attention_head_dim: features of a head in self-attention; not to be seen in any shape.
        cross_attention_head_dim: the same in cross-attention.

    Returns:
        Both in evaluation mode, in the file's floating type. Every size comes from the shapes: an
        edit checkpoint gives an edit painter.

    Raises:
        CheckpointError: no such file, not a safetensors file, or tensors are missing, unknown or
            of a wrong shape; the message lists them.
    """
    tensors = _read(Path(path))
    connector = _connector(_under(CONNECTOR, tensors), where=str(path))
    painter = _painter(
        _under(PAINTER, tensors), attention_head_dim, cross_attention_head_dim, where=str(path)
    )
    if painter.condition_features != connector.out_features:
        raise CheckpointError(
            f"{path}: the connector gives {connector.out_features} features a token, the painter "
            f"takes {painter.condition_features}"
        )
    return connector, painter


def _read(path: Path) -> dict[str, Tensor]:
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"checkpoint not found: {file}")
    try:
        with safe_open(file, framework="pt") as reader:
            wanted = [k for k in reader.keys() if k.startswith((CONNECTOR, PAINTER))]  # noqa: SIM118
            return {key: reader.get_tensor(key) for key in wanted}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} is not a readable safetensors file: {error}") from None


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _connector(tensors: dict[str, Tensor], *, where: str) -> Connector:
    first = _shape(tensors, "0.weight", 2, CONNECTOR, where)
    with torch.device("meta"):
        connector = Connector(first[1], first[0])
    _fill(connector, tensors, CONNECTOR, where)
    return connector.eval()


def _painter(
    tensors: dict[str, Tensor], head_dim: int, cross_head_dim: int, *, where: str
) -> Painter:
    architecture = _architecture(tensors, head_dim, cross_head_dim, where)
    with torch.device("meta"):
        network = SanaTransformer2DModel(**architecture)
    if NULL_TABLE not in tensors:
        raise CheckpointError(f"{where}: missing {PAINTER}{NULL_TABLE}")
    null_condition = tensors[NULL_TABLE]
    if null_condition.ndim != 2 or null_condition.shape[1] != architecture["caption_channels"]:
        raise CheckpointError(
            f"{where}: {PAINTER}{NULL_TABLE} has shape {tuple(null_condition.shape)}, "
            f"not (rows, {architecture['caption_channels']})"
        )
    renamed = dict(_renamed(tensors, where))
    _fill(network, renamed, PAINTER, where)
    return Painter(network, null_condition).eval()


def _architecture(
    tensors: dict[str, Tensor], head_dim: int, cross_head_dim: int, where: str
) -> dict[str, object]:
    """diffusers' constructor arguments, read off the shapes."""
    inner, in_channels, patch, _ = _shape(tensors, "x_embedder.proj.weight", 4, PAINTER, where)
    caption = _shape(tensors, "y_embedder.y_proj.fc1.weight", 2, PAINTER, where)[1]
    outputs = _shape(tensors, "final_layer.linear.weight", 2, PAINTER, where)[0]
    hidden = _shape(tensors, "blocks.0.mlp.point_conv.conv.weight", 4, PAINTER, where)[1]
    for name, size in (("attention", head_dim), ("cross-attention", cross_head_dim)):
        if inner % size:
            raise CheckpointError(f"{where}: width {inner} has no {name} heads of {size} features")
    qk_norms = {f"blocks.0.{part}.q_norm.weight" in tensors for part in ("attn", "cross_attn")}
    if len(qk_norms) > 1:
        raise CheckpointError(
            f"{where}: query and key norms are there for one of self- and cross-attention only"
        )
    return {
        "in_channels": in_channels,
        "out_channels": outputs // patch**2,
        "num_layers": _depth(tensors),
        "num_attention_heads": inner // head_dim,
        "attention_head_dim": head_dim,
        "num_cross_attention_heads": inner // cross_head_dim,
        "cross_attention_head_dim": cross_head_dim,
        "cross_attention_dim": inner,
        "caption_channels": caption,
        "mlp_ratio": _ratio(hidden, inner),
        "attention_bias": "blocks.0.attn.qkv.bias" in tensors,
        "qk_norm": "rms_norm_across_heads" if qk_norms == {True} else None,
        "patch_size": patch,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
    }


def _depth(tensors: dict[str, Tensor]) -> int:
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d+)\.", key) for key in tensors) if m}
    return max(blocks) + 1


def _ratio(hidden: int, inner: int) -> float:
    """The number whose product with ``inner`` truncates to ``hidden``."""
    ratio = hidden / inner
    return ratio if int(ratio * inner) == hidden else (hidden + 0.5) / inner


def _renamed(tensors: dict[str, Tensor], where: str) -> Iterator[tuple[str, Tensor]]:
    unknown = []
    for key, tensor in tensors.items():
        if key == NULL_TABLE or key in UNUSED:
            continue
        names = _diffusers_names(key)
        if not names:
            unknown.append(PAINTER + key)
            continue
        yield from zip(names, tensor.chunk(len(names)), strict=True)
    if unknown:
        raise CheckpointError(f"{where}: unknown tensors {', '.join(unknown)}")


def _diffusers_names(key: str) -> tuple[str, ...]:
    block = re.match(r"blocks\.(\d+)\.(.*)", key)
    prefix, name, table = ("", key, RENAMES)
    if block:
        prefix, name, table = (f"transformer_blocks.{block[1]}.", block[2], BLOCK_RENAMES)
    for published, renamed in table:
        rest = name.removeprefix(published)
        if name.startswith(published) and rest in ("", ".weight", ".bias"):
            targets = (renamed,) if isinstance(renamed, str) else renamed
            return tuple(prefix + target + rest for target in targets)
    return ()


def _shape(
    tensors: dict[str, Tensor], key: str, dimensions: int, prefix: str, where: str
) -> tuple[int, ...]:
    if key not in tensors:
        raise CheckpointError(f"{where}: missing {prefix}{key}")
    shape = tuple(tensors[key].shape)
    if len(shape) != dimensions:
        raise CheckpointError(
            f"{where}: {prefix}{key} has {len(shape)} dimensions, not {dimensions}"
        )
    return shape


def _fill(module: torch.nn.Module, tensors: dict[str, Tensor], part: str, where: str) -> None:
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    problems = [f"missing {key}" for key in expected.keys() - tensors.keys()]
    problems += [f"unknown {key}" for key in tensors.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(tensors[key].shape)}, not {expected[key]}"
        for key in expected.keys() & tensors.keys()
        if tuple(tensors[key].shape) != expected[key]
    ]
    if problems:
        raise CheckpointError(f"{where}, {part}*: {'; '.join(sorted(problems))}")
    require_finite(where, tensors)
    # clone(): a chunk of a stacked tensor must not share (or keep alive) its neighbours' memory
    module.load_state_dict({key: value.clone() for key, value in tensors.items()}, assign=True)
