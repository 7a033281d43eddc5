"""A small checkpoint in the published layout."""

from __future__ import annotations

import torch

HEADS = {"attention_head_dim": 8, "cross_attention_head_dim": 6}


def published(
    *,
    layers: int = 3,
    width: int = 48,
    channels: int = 5,
    hidden_size: int = 28,
    source: bool = True,
    patch: int = 1,
) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, of sizes unlike any real checkpoint's.

    The heads are those of ``HEADS``; the table of positions is of 3 x 5 cells.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / max(1, shape[-1]) ** 0.5

    hidden, caption = int(1.75 * width), 20
    tensors = {
        "projector.0.weight": random(caption, hidden_size),
        "projector.0.bias": random(caption),
        "projector.2.weight": random(caption, caption),
        "projector.2.bias": random(caption),
    }
    model = {
        "pos_embed": random(1, 15, width),
        "x_embedder.proj.weight": random(width, channels * (1 + source), patch, patch),
        "x_embedder.proj.bias": random(width),
        "t_embedder.mlp.0.weight": random(width, 256),
        "t_embedder.mlp.0.bias": random(width),
        "t_embedder.mlp.2.weight": random(width, width),
        "t_embedder.mlp.2.bias": random(width),
        "t_block.1.weight": random(6 * width, width),
        "t_block.1.bias": random(6 * width),
        "y_embedder.y_embedding": random(30, caption),
        "y_embedder.y_proj.fc1.weight": random(width, caption),
        "y_embedder.y_proj.fc1.bias": random(width),
        "y_embedder.y_proj.fc2.weight": random(width, width),
        "y_embedder.y_proj.fc2.bias": random(width),
        "attention_y_norm.weight": random(width),
        "final_layer.scale_shift_table": random(2, width),
        "final_layer.linear.weight": random(channels * patch**2, width),
        "final_layer.linear.bias": random(channels * patch**2),
    }
    for layer in range(layers):
        block = {
            "scale_shift_table": random(6, width),
            "attn.qkv.weight": random(3 * width, width),
            "attn.proj.weight": random(width, width),
            "attn.proj.bias": random(width),
            "cross_attn.q_linear.weight": random(width, width),
            "cross_attn.q_linear.bias": random(width),
            "cross_attn.kv_linear.weight": random(2 * width, width),
            "cross_attn.kv_linear.bias": random(2 * width),
            "cross_attn.proj.weight": random(width, width),
            "cross_attn.proj.bias": random(width),
            "mlp.inverted_conv.conv.weight": random(2 * hidden, width, 1, 1),
            "mlp.inverted_conv.conv.bias": random(2 * hidden),
            "mlp.depth_conv.conv.weight": random(2 * hidden, 1, 3, 3),
            "mlp.depth_conv.conv.bias": random(2 * hidden),
            "mlp.point_conv.conv.weight": random(width, hidden, 1, 1),
        }
        for part in ("attn", "cross_attn"):
            block |= {f"{part}.{name}_norm.weight": random(width) for name in "qk"}
        model |= {f"blocks.{layer}.{key}": value for key, value in block.items()}
    return tensors | {f"decoder.model.{key}": value for key, value in model.items()}
