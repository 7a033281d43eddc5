"""diffusers reads our adapters, and we read what diffusers writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SanaPipeline, SanaTransformer2DModel
from peft import LoraConfig, get_peft_model_state_dict

from dim import model as models
from dim.model import DIM
from dim.model.painter import QK_NORM_EPS
from tests.dim.model.lora.adapters import make_adapter

SETTINGS = {"rank": 4, "alpha": 6, "targets": ["to_q", "to_k", "to_v", "to_out", "ff.conv_point"]}


@pytest.fixture(scope="module")
def narrow(editor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image DIM, whose painter is SANA's own network."""
    config = models.load(editor).config
    painter = config.painter.model_copy(update={"source_latent": False})
    folder = tmp_path_factory.mktemp("t2i") / "model"
    models.build(config.model_copy(update={"painter": painter}), seed=3).save(folder)
    return folder


def plain_pipeline(base: Path) -> SanaPipeline:
    """SANA's pipeline around the network in ``base``, as diffusers loads it."""
    transformer = SanaTransformer2DModel.from_pretrained(base / "painter")
    for block in transformer.transformer_blocks:  # the published network's, see docs/decisions.md
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = QK_NORM_EPS
    return SanaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=models.load(base).autoencoder.network,
        transformer=transformer.eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@torch.no_grad()
def compare(transformer: SanaTransformer2DModel, model: DIM) -> float:
    """The largest difference between diffusers' own forward and our painter's."""
    generator = torch.Generator().manual_seed(0)
    latent = torch.randn(2, 8, 8, 8, generator=generator)
    condition = torch.randn(2, 5, 96, generator=generator)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    theirs = transformer(
        hidden_states=latent,
        encoder_hidden_states=condition,
        encoder_attention_mask=mask,
        timestep=torch.tensor([700.0, 300.0]),
    ).sample
    ours = model.painter(latent, torch.tensor([700.0, 300.0]), condition, mask)
    return float((theirs - ours).abs().max())


def test_sanas_pipeline_takes_our_file_unchanged(narrow: Path, tmp_path: Path) -> None:
    adapter = make_adapter(narrow, tmp_path / "adapter", **SETTINGS)
    pipeline = plain_pipeline(narrow)
    ours = models.load(narrow, lora=[str(adapter)])
    assert compare(pipeline.transformer, ours) > 1e-3
    pipeline.load_lora_weights(adapter)
    assert compare(pipeline.transformer, ours) < 1e-5
    pipeline.set_adapters(pipeline.get_active_adapters(), [0.5])
    assert compare(pipeline.transformer, models.load(narrow, lora=[f"{adapter}:0.5"])) < 1e-5
    image = pipeline(
        prompt_embeds=torch.randn(1, 5, 96),
        prompt_attention_mask=torch.ones(1, 5, dtype=torch.long),
        height=64, width=64, num_inference_steps=2, guidance_scale=1.0,
        use_resolution_binning=False, output_type="pil",
    ).images[0]  # fmt: skip
    assert image.size == (64, 64)


def test_an_editors_adapter_fits_a_plain_sana(editor: Path, narrow: Path, tmp_path: Path) -> None:
    """Its low-rank part does; the patch embedding that sees a source stays behind."""
    settings = SETTINGS | {"train": ["patch_embed", "null_condition"]}
    adapter = make_adapter(editor, tmp_path / "adapter", **settings)
    edits = models.load(editor, lora=[str(adapter)])
    network = edits.painter.network
    pipeline = plain_pipeline(narrow)
    without = models.load(editor).painter.network.state_dict()
    without["patch_embed.proj.weight"] = network.patch_embed.proj.weight[:, :8]
    without["patch_embed.proj.bias"] = network.patch_embed.proj.bias
    pipeline.transformer.load_state_dict(without)
    pipeline.load_lora_weights(adapter)
    assert compare(pipeline.transformer, edits) < 1e-5  # no source: zeros in its channels


def test_we_read_what_sanas_training_script_writes(narrow: Path, tmp_path: Path) -> None:
    pipeline = plain_pipeline(narrow)
    config = LoraConfig(
        r=4, lora_alpha=2, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v"]
    )
    pipeline.transformer.add_adapter(config)
    with torch.no_grad():
        for name, parameter in pipeline.transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    SanaPipeline.save_lora_weights(
        tmp_path,
        transformer_lora_layers=get_peft_model_state_dict(pipeline.transformer),
        transformer_lora_adapter_metadata=pipeline.transformer.peft_config["default"].to_dict(),
    )
    assert compare(pipeline.transformer, models.load(narrow)) > 1e-3
    assert compare(pipeline.transformer, models.load(narrow, lora=[str(tmp_path)])) < 1e-5
