from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from dim.errors import CheckpointError
from dim.model import released

HEADS = {"attention_head_dim": 8, "cross_attention_head_dim": 6}


def published(*, layers=3, width=48, channels=5, source=True, patch=1) -> dict[str, torch.Tensor]:
    """Random tensors under the published names, of sizes unlike any real checkpoint's."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) / max(1, shape[-1]) ** 0.5

    hidden, caption = int(1.75 * width), 20
    tensors = {
        "projector.0.weight": random(caption, 28),
        "projector.0.bias": random(caption),
        "projector.2.weight": random(caption, caption),
        "projector.2.bias": random(caption),
    }
    model = {
        "pos_embed": random(1, 16, width),
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


@pytest.mark.parametrize("source", [True, False])
@pytest.mark.parametrize("patch", [1, 2])
def test_every_size_comes_from_the_shapes(tmp_path, source, patch):
    tensors = published(source=source, patch=patch)
    frozen = {"mllm.norm.weight": torch.ones(3), "decoder.vae.conv.weight": torch.ones(3)}
    save_file(tensors | frozen, tmp_path / "model.safetensors")
    connector, painter = released.load(tmp_path, **HEADS)

    assert (connector.in_features, connector.out_features) == (28, 20)
    assert painter.takes_source is source and painter.null_condition.shape == (30, 20)
    config = painter.network.config
    assert (config.num_layers, config.num_attention_heads, config.patch_size) == (3, 6, patch)
    assert config.num_cross_attention_heads == 8
    latent = torch.randn(2, 5, 4, 6)
    velocity = painter(latent, 700.0, connector(torch.randn(2, 7, 28)), torch.ones(2, 7))
    assert velocity.shape == latent.shape and velocity.isfinite().all()


def test_tensors_keep_their_type_and_stacked_ones_are_taken_apart(tmp_path):
    tensors = {key: value.bfloat16() for key, value in published().items()}
    save_file(tensors, tmp_path / "edit.safetensors")
    connector, painter = released.load(tmp_path / "edit.safetensors", **HEADS)
    assert {p.dtype for m in (connector, painter) for p in m.parameters()} == {torch.bfloat16}
    block = painter.network.transformer_blocks[1]
    query, key, value = tensors["decoder.model.blocks.1.attn.qkv.weight"].chunk(3)
    assert torch.equal(block.attn1.to_q.weight, query)
    assert torch.equal(block.attn1.to_k.weight, key)
    assert torch.equal(block.attn1.to_v.weight, value)
    assert block.attn1.to_q.weight.untyped_storage().nbytes() == query.nbytes


def test_all_that_is_wrong_is_listed_at_once(tmp_path):
    tensors = published()
    del tensors["decoder.model.blocks.2.attn.proj.bias"]
    tensors["decoder.model.blocks.0.cross_attn.proj.weight"] = torch.zeros(48, 7)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        released.load(tmp_path, **HEADS)
    assert "missing transformer_blocks.2.attn1.to_out.0.bias" in str(error.value)
    assert "transformer_blocks.0.attn2.to_out.0.weight is (48, 7), not (48, 48)" in str(error.value)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("decoder.model.y_embedder.y_embedding", "missing decoder.model.y_embedder.y_embedding"),
        ("decoder.model.x_embedder.proj.weight", "missing decoder.model.x_embedder.proj.weight"),
        ("projector.0.weight", "missing projector.0.weight"),
        ("projector.2.bias", "missing 2.bias"),
        ("decoder.model.blocks.0.attn.q_norm.weight", "one of self- and cross-attention"),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, remove, message):
    tensors = published()
    del tensors[remove]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        released.load(tmp_path, **HEADS)


def test_an_unknown_tensor_is_named(tmp_path):
    save_file(
        published() | {"decoder.model.blocks.0.lora.weight": torch.ones(2)},
        tmp_path / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match=r"unknown .*decoder\.model\.blocks\.0\.lora\.weight"):
        released.load(tmp_path, **HEADS)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    tensors = published()
    tensors["decoder.model.t_block.1.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite: .*time_embed\.linear\.bias"):
        released.load(tmp_path, **HEADS)


def test_files_that_are_no_checkpoint_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint not found"):
        released.load(tmp_path / "model.safetensors")
    whole = tmp_path / "model.safetensors"
    save_file(published(), whole)
    whole.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        released.load(whole)
    whole.write_bytes(b"hello")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        released.load(whole)
    save_file({"other": torch.ones(2)}, whole)
    with pytest.raises(CheckpointError, match=r"missing projector\.0\.weight"):
        released.load(whole)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    save_file(published(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="width 48 has no cross-attention heads of 112"):
        released.load(tmp_path, attention_head_dim=16)


def test_the_file_is_not_held_open_or_mapped(tmp_path, golden):
    copy = shutil.copy(golden.file, tmp_path / "copy.safetensors")
    heads = {"attention_head_dim": 16, "cross_attention_head_dim": 16}
    _, painter = released.load(copy, **heads)
    expected = load_file(golden.file)["decoder.model.final_layer.linear.weight"]
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert torch.equal(painter.network.proj_out.weight, expected)
