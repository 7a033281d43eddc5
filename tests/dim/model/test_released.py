from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from diffusers import SanaTransformer2DModel
from safetensors.torch import load_file, save_file

from dim.config import load_config
from dim.errors import CheckpointError
from dim.model import released
from dim.model.checkpoint.tensorfile import Spec
from dim.model.config import ModelConfig
from tests.dim.model.published import HEADS, published

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


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
    del tensors["projector.0.weight"]
    del tensors["decoder.model.blocks.1.attn.q_norm.weight"]
    tensors["decoder.model.blocks.0.cross_attn.proj.weight"] = torch.zeros(48, 7)
    tensors["decoder.model.blocks.0.lora.weight"] = torch.zeros(2)
    tensors["decoder.model.t_block.1.bias"] = torch.zeros(288, dtype=torch.int64)
    save_file(tensors, tmp_path / "model.safetensors")
    said = [
        "decoder.model.t_block.1.bias is of type I64",
        "missing decoder.model.blocks.1.attn.q_norm.weight",
        "missing decoder.model.blocks.2.attn.proj.bias",
        "unexpected decoder.model.blocks.0.lora.weight",
    ]
    with pytest.raises(CheckpointError) as error:
        released.load(tmp_path, **HEADS)
    assert all(phrase in str(error.value) for phrase in [*said, "missing projector.0.weight"])
    # shapes can only be judged when no decisive tensor is missing
    save_file(tensors | {"projector.0.weight": torch.zeros(20, 28)}, tmp_path / "model.safetensors")
    said.append("decoder.model.blocks.0.cross_attn.proj.weight is (48, 7), not (48, 48)")
    with pytest.raises(CheckpointError) as error:
        released.load(tmp_path, **HEADS)
    assert all(phrase in str(error.value) for phrase in said)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ("decoder.model.y_embedder.y_embedding", "missing decoder.model.y_embedder.y_embedding"),
        ("decoder.model.x_embedder.proj.weight", "missing decoder.model.x_embedder.proj.weight"),
        ("projector.0.weight", "missing projector.0.weight"),
        ("projector.2.bias", "missing projector.2.bias"),
        (
            "decoder.model.blocks.0.attn.q_norm.weight",
            "missing decoder.model.blocks.0.attn.q_norm.weight",
        ),
    ],
)
def test_a_missing_tensor_is_named(tmp_path, remove, message):
    tensors = published()
    del tensors[remove]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        released.load(tmp_path, **HEADS)


def test_weights_that_are_no_numbers_are_refused(tmp_path):
    tensors = published()
    tensors["decoder.model.t_block.1.bias"][3] = float("nan")
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"not finite: decoder\.model\.t_block\.1\.bias"):
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
    whole.unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor model\.safe.*index"):
        released.load(tmp_path)
    save_file({"other": torch.ones(2)}, whole)
    with pytest.raises(CheckpointError, match=r"missing projector\.0\.weight"):
        released.load(whole)


def test_heads_that_do_not_divide_the_width_are_refused(tmp_path):
    save_file(published(), tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="width 48 has no cross-attention heads of 112"):
        released.load(tmp_path, attention_head_dim=16)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("decoder.model.x_embedder.proj.weight", (48, 7, 1, 1), "7 channels for latents of 5"),
        ("decoder.model.x_embedder.proj.weight", (48, 10), r"\(48, 10\), not 4 sizes above zero"),
        ("projector.0.weight", (0, 28), r"\(0, 28\), not 2 sizes above zero"),
    ],
)
def test_sizes_that_no_painter_has_are_refused(tmp_path, name, shape, message):
    save_file(published() | {name: torch.zeros(shape)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        released.load(tmp_path, **HEADS)


@pytest.mark.parametrize(
    ("source", "found", "wanted"), [(True, "edit", "t2i"), (False, "t2i", "edit")]
)
def test_a_checkpoint_of_the_other_task_is_refused(tmp_path, source, found, wanted):
    save_file(published(source=source), tmp_path / "model.safetensors")
    _, painter = released.load(tmp_path, **HEADS, task=found)
    assert painter.takes_source is source
    with pytest.raises(
        CheckpointError, match=r"is an? \S+ checkpoint \(.*where an? \S+ one is exp"
    ):
        released.load(tmp_path, **HEADS, task=wanted)


def test_the_file_is_not_held_open_or_mapped(tmp_path, golden):
    copy = shutil.copy(golden.file, tmp_path / "copy.safetensors")
    heads = {"attention_head_dim": 16, "cross_attention_head_dim": 16}
    _, painter = released.load(copy, **heads)
    expected = load_file(golden.file)["decoder.model.final_layer.linear.weight"]
    copy.write_bytes(b"\0" * copy.stat().st_size)
    assert torch.equal(painter.network.proj_out.weight, expected)


def test_the_published_sizes_are_read_off_a_header():
    config = load_config(ModelConfig, CONFIGS / "dim-4.6b.yaml").painter.architecture
    with torch.device("meta"):
        network = SanaTransformer2DModel(**config | {"in_channels": 64})
    shapes = released.published_shapes(network, 2048, 8192)
    specs = {name: Spec("BF16", shape) for name, shape in shapes.items()}
    layout, problems = released.read_layout(specs)
    assert problems == [] and layout.task == "edit"
    assert (layout.hidden_size, layout.null_condition_tokens) == (2048, 8192)
    sizes = {name: value for name, value in config.items() if name != "sample_size"}
    assert layout.architecture == sizes | {"in_channels": 64}
    counted = sum(spec.count for name, spec in specs.items() if name.startswith("decoder"))
    assert counted == 1_604_713_632 + 8192 * 2304
