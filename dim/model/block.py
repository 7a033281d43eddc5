"""A block of the network while sampling: the same numbers for less time and memory.

diffusers' own ``SanaTransformerBlock.forward`` serves training. Here the condition comes as ready
keys and values, branches that still see the same are computed once, and the feed-forward layer's
wide states exist a few rows at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dim.model.attention import Attended

# Numbers in the feed-forward layer's wide states (five times as wide as the block) at one time:
# 64 MB in single precision, large enough to keep any device busy.
WIDE_NUMBERS = 1 << 24


def sampling_block(
    block: Any,
    states: Tensor,
    modulation: Tensor,
    ready: Attended,
    size: tuple[int, int],
    spread: Tensor | None = None,
) -> Tensor:
    """What ``block`` makes of ``states``.

    Args:
        block: a ``SanaTransformerBlock`` whose cross-attention takes ``KeysAndValues``.
        states: (B, L, F).
        modulation: (B, 6 · F), the timestep's embedding.
        ready: keys and values of R rows.
        size: (height, width) in tokens; L is their product.
        spread: (R,) int64, which of ``states`` each row goes on from where branches do not differ
            yet; None where R is B.

    Returns:
        (R, L, F): branches differ as soon as they attended to their conditions.
    """
    table = block.scale_shift_table + modulation.unflatten(1, (6, -1))
    shift, scale, gate = table[:, :3].chunk(3, dim=1)
    inner = block.norm1(states) * (1 + scale) + shift
    states = states + gate * block.attn1(inner.to(states.dtype))
    if spread is not None:
        states, table = states[spread], table[spread]
    states = states + block.attn2(states, encoder_hidden_states=ready)
    wide_shift, wide_scale, wide_gate = table[:, 3:].chunk(3, dim=1)
    inner = block.norm2(states) * (1 + wide_scale) + wide_shift
    return states + wide_gate * feed_forward(block.ff, inner, size)


def feed_forward(layer: Any, states: Tensor, size: tuple[int, int]) -> Tensor:
    """What the ``GLUMBConv`` ``layer`` makes of ``states`` (R, L, F), a few rows at a time."""
    # Of the weight and not of the layer, which may be one with an adapter around it.
    wide = states.shape[1] * layer.conv_inverted.weight.shape[0]
    cells = states.unflatten(1, size).permute(0, 3, 1, 2)
    pieces = [_gated(layer, piece) for piece in cells.split(max(1, WIDE_NUMBERS // wide))]
    painted = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return painted.flatten(2).transpose(1, 2)


def _gated(layer: Any, cells: Tensor) -> Tensor:
    wide = functional.silu(layer.conv_inverted(cells), inplace=True)
    kept, gate = layer.conv_depth(wide).chunk(2, dim=1)
    return layer.conv_point(kept * functional.silu(gate))
