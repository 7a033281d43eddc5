"""The network's two attentions: linear over the latent's cells, and to the condition's tokens.

Both are diffusers' own processors, each with one thing more: linear attention stays in single
precision under autocast, and keys and values of a condition are computed once for all steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.attention_processor import SanaLinearAttnProcessor2_0
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor
from torch.nn import functional


class LinearAttention(SanaLinearAttnProcessor2_0):
    """diffusers' processor, whose sums over all cells are of single precision under autocast too.

    diffusers turns queries, keys and values into float32, and autocast turns them back: the sum
    that every cell is divided by would have eight bits. The published training switches autocast
    off at the same place.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from and to ``hidden_states`` (B, L, F); returns (B, L, F)."""
        query, key, value = (layer(hidden_states) for layer in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        with torch.autocast(hidden_states.device.type, enabled=False):
            cells = [_cells(tensor, attn.heads) for tensor in (query.relu(), key.relu(), value)]
            attended = linear_attention(*cells)
        attended = attended.flatten(1, 2).transpose(1, 2).to(hidden_states.dtype)
        out = attn.to_out[1](attn.to_out[0](attended))
        return out.clip(-65504, 65504) if hidden_states.dtype == torch.float16 else out


# Of fewer cells MKL makes a product by a kernel that depends on how many there are in the batch.
_ENOUGH_CELLS = 16


def linear_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Σ value·(key·query) / Σ key·query over all cells; each (B, heads, features, L), float32."""
    cells = query.shape[-1]
    if cells < _ENOUGH_CELLS:
        missing = (0, _ENOUGH_CELLS - cells)  # of zeros, which add nothing to any sum
        query, key, value = (functional.pad(part, missing) for part in (query, key, value))
    # A row of ones below the values makes the sum of the weights with the same product.
    scores = functional.pad(value, (0, 0, 0, 1), value=1.0) @ key.transpose(2, 3)
    weighted = scores @ query
    return weighted[:, :, :-1, :cells] / (weighted[:, :, -1:, :cells] + 1e-15)


@dataclass(frozen=True)
class KeysAndValues:
    """What one block attends to: (B, heads, N, features) each, and a bias (B, 1, 1, N) or None."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


Attended = KeysAndValues | tuple[KeysAndValues, ...]
"""What the rows of a batch attend to: one tensor for all, or some rows after the others their own,
of any lengths."""


class CrossAttention(SanaAttnProcessor2_0):
    """diffusers' processor, which also takes what is ``Attended`` in place of a condition."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | Attended | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` (B, L, F); returns (B, L, F)."""
        if not isinstance(encoder_hidden_states, KeysAndValues | tuple):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        attended = _attended(_by_head(query, attn.heads), encoder_hidden_states)
        return attn.to_out[0](attended.transpose(1, 2).flatten(2)) / attn.rescale_output_factor


def keys_and_values(attn: Any, states: Tensor, bias: Tensor | None) -> KeysAndValues:
    """What ``attn`` makes of ``states`` (B, N, F): the part that no step changes."""
    keys = attn.to_k(states)
    if attn.norm_k is not None:
        keys = attn.norm_k(keys)
    return KeysAndValues(_by_head(keys, attn.heads), _by_head(attn.to_v(states), attn.heads), bias)


def _attended(query: Tensor, ready: Attended) -> Tensor:
    """Attention (R, heads, L, features) of as many rows' queries."""
    if isinstance(ready, tuple):
        rows = query.split([len(one.keys) for one in ready])
        return torch.cat([_attended(*pair) for pair in zip(rows, ready, strict=True)])
    return functional.scaled_dot_product_attention(
        query, ready.keys, ready.values, attn_mask=ready.bias
    )


def _cells(tensor: Tensor, heads: int) -> Tensor:
    return tensor.transpose(1, 2).unflatten(1, (heads, -1)).float()


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)
