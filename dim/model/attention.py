"""Cross-attention whose keys and values are computed once for all steps of a sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True)
class KeysAndValues:
    """What one block attends to: (B, heads, N, features) each, and a bias (B, 1, 1, N) or None."""

    keys: Tensor
    values: Tensor
    bias: Tensor | None


class CrossAttention(SanaAttnProcessor2_0):
    """diffusers' processor, which also takes ready ``KeysAndValues`` in place of a condition."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | KeysAndValues | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Attend from ``hidden_states`` (B, L, F); returns (B, L, F)."""
        if not isinstance(encoder_hidden_states, KeysAndValues):
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        query = attn.to_q(hidden_states)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        attended = functional.scaled_dot_product_attention(
            _by_head(query, attn.heads),
            encoder_hidden_states.keys,
            encoder_hidden_states.values,
            attn_mask=encoder_hidden_states.bias,
        )
        return attn.to_out[0](attended.transpose(1, 2).flatten(2)) / attn.rescale_output_factor


def keys_and_values(attn: Any, states: Tensor, bias: Tensor | None) -> KeysAndValues:
    """What ``attn`` makes of ``states`` (B, N, F): the part that no step changes."""
    keys = attn.to_k(states)
    if attn.norm_k is not None:
        keys = attn.norm_k(keys)
    return KeysAndValues(_by_head(keys, attn.heads), _by_head(attn.to_v(states), attn.heads), bias)


def _by_head(tensor: Tensor, heads: int) -> Tensor:
    return tensor.unflatten(2, (heads, -1)).transpose(1, 2)
