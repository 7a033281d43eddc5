from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from safetensors.torch import load_file, save_file

from dim import model
from dim.errors import CheckpointError, ConfigError, InputError
from dim.model import parts, released
from dim.model.checkpoint import folder, tensorfile
from dim.model.checkpoint.exporter import export_checkpoint
from dim.model.checkpoint.importer import Changes, import_checkpoint
from dim.model.checkpoint.summary import summarise
from dim.model.config import AutoencoderConfig, ModelConfig, PainterConfig, UnderstandingConfig
from tests.dim.model.published import HEADS, published

UNDERSTANDING = "package:tiny/understanding"
ELSEWHERE = "someone/a-qwen-that-is-nowhere-here"


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory) -> Path:
    """A random DC-AE of five latent channels in diffusers' format."""
    torch.manual_seed(0)
    network = AutoencoderDC(
        latent_channels=5,
        encoder_block_types="ResBlock",
        decoder_block_types="ResBlock",
        encoder_block_out_channels=[10, 20],
        decoder_block_out_channels=[10, 20],
        encoder_layers_per_block=[1, 1],
        decoder_layers_per_block=[1, 1],
        encoder_qkv_multiscales=[[], []],
        decoder_qkv_multiscales=[[], []],
        upsample_block_type="interpolate",
        downsample_block_type="Conv",
        scaling_factor=0.5,
    )
    path = tmp_path_factory.mktemp("autoencoder")
    network.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def settings(autoencoder) -> ModelConfig:
    """Where the frozen parts are."""
    return ModelConfig(
        understanding=UnderstandingConfig(weights=UNDERSTANDING, image_size=64),
        autoencoder=AutoencoderConfig(weights=str(autoencoder)),
        sampling={"resolution": 32, "steps": 2},
    )


@pytest.fixture(scope="module")
def whole(autoencoder) -> dict[str, torch.Tensor]:
    """Every part of a published edit checkpoint, in several types."""
    tensors = {key: value.bfloat16() for key, value in published(hidden_size=128).items()}
    tensors["decoder.model.y_embedder.y_embedding"] = torch.randn(30, 20)
    vae = load_file(autoencoder / "diffusion_pytorch_model.safetensors")
    place = Path(parts.weights_path(UNDERSTANDING)) / "model.safetensors"
    return (
        tensors
        | {f"decoder.vae.{key}": value for key, value in vae.items()}
        | {f"mllm.{key}": value for key, value in load_file(place).items()}
    )


@pytest.fixture(scope="module")
def imported(whole, settings, tmp_path_factory) -> Path:
    """The folder of ``whole``, whose file lies beside it."""
    path = tmp_path_factory.mktemp("imported")
    save_file(whole, path / "model.safetensors", {"format": "pt"})
    import_checkpoint(path / "model.safetensors", path / "dim", config=settings, **HEADS)
    return path / "dim"


def saved(tensors: dict[str, torch.Tensor], folder: Path) -> Path:
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


def painter_of(path: Path):
    return parts.painter(
        PainterConfig(weights=str(path / "painter"), null_condition_tokens=30, source_latent=False)
        if summarise(path).stage == "t2i"
        else PainterConfig(weights=str(path / "painter"), null_condition_tokens=30)
    )


def same_tensors(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def test_an_export_of_an_import_is_the_checkpoint_byte_by_byte(imported, tmp_path):
    [file] = export_checkpoint(imported, tmp_path / "again.safetensors")
    assert file.read_bytes() == (imported.parent / "model.safetensors").read_bytes()
    [file] = export_checkpoint(imported, tmp_path / "folder")
    assert file == tmp_path / "folder" / "model.safetensors"
    assert file.read_bytes() == (imported.parent / "model.safetensors").read_bytes()


def test_a_published_layout_says_what_was_seen_if_it_was_not_as_published(
    imported, settings, tmp_path
):
    shutil.copytree(imported, tmp_path / "dim")
    file = tmp_path / "dim" / "dim.json"
    description = json.loads(file.read_text())
    description["config"]["understanding"]["vlm_view"] = "region"
    file.write_text(json.dumps(description))
    [out] = export_checkpoint(tmp_path / "dim", tmp_path / "out.safetensors")
    assert tensorfile.TensorFiles([out]).metadata["vlm_view"] == "region"
    import_checkpoint(out, tmp_path / "back", config=settings, **HEADS)
    assert folder.read_description(tmp_path / "back").config.understanding.vlm_view == "region"
    tensors = load_file(out)
    save_file(tensors, out, {"format": "pt", "vlm_view": "half"})
    with pytest.raises(CheckpointError, match="vlm_view in its header: 'half' is not known"):
        import_checkpoint(out, tmp_path / "other", config=settings, **HEADS)


def test_golden_checkpoints_go_there_and_back(golden, settings, tmp_path):
    config = settings.model_copy(
        update={
            "understanding": UnderstandingConfig(weights=ELSEWHERE),
            "autoencoder": AutoencoderConfig(architecture=_architecture(settings, 4)),
        }
    )
    heads = {"attention_head_dim": 16, "cross_attention_head_dim": 16}
    vae = parts.autoencoder(config.autoencoder).network
    vae.save_pretrained(tmp_path / "vae")
    config = config.model_copy(
        update={"autoencoder": AutoencoderConfig(weights=str(tmp_path / "vae"))}
    )
    import_checkpoint(golden.file, tmp_path / "dim", config=config, **heads)
    [file] = export_checkpoint(tmp_path / "dim", tmp_path / "again.safetensors")
    assert file.read_bytes() == golden.file.read_bytes()
    located = folder.located(tmp_path / "dim", folder.read_description(tmp_path / "dim"))
    painter = parts.painter(located.painter)
    condition = parts.connector(located.connector, 48)(golden.io["hidden_states"])
    with torch.no_grad():
        velocity = painter(
            golden.io["noisy_latent"], 937.0, condition, golden.io["mask"], golden.source
        )
    torch.testing.assert_close(velocity, golden.io["out_t937"], atol=1e-5, rtol=0)


def _architecture(settings: ModelConfig, latent_channels: int) -> dict:
    return parts.autoencoder_config(settings.autoencoder) | {
        "latent_channels": latent_channels,
        "encoder_block_out_channels": [8, 16],
        "decoder_block_out_channels": [8, 16],
    }


def test_an_import_of_an_export_is_the_folder(tiny_model_dir, tmp_path):
    export_checkpoint(
        tiny_model_dir, tmp_path / "model.safetensors", autoencoder=True, understanding=True
    )
    description = folder.read_description(tiny_model_dir)
    config = folder.located(tiny_model_dir, description)
    import_checkpoint(tmp_path / "model.safetensors", tmp_path / "dim", config=config)
    for name in (
        "connector.safetensors",
        "null_condition.safetensors",
        "painter/diffusion_pytorch_model.safetensors",
        "painter/config.json",
        "autoencoder/diffusion_pytorch_model.safetensors",
        "autoencoder/config.json",
        "understanding/model.safetensors",
        "understanding/tokenizer.json",
    ):
        assert (tmp_path / "dim" / name).read_bytes() == (tiny_model_dir / name).read_bytes(), name
    again = folder.read_description(tmp_path / "dim").config
    for section in ("understanding", "connector", "painter", "autoencoder", "sampling"):
        nowhere = {"weights": None, "dtype": None, "architecture": {}}
        one, other = (
            getattr(c, section).model_dump() | nowhere for c in (description.config, again)
        )
        assert one == other
    for mine, theirs in zip(
        model.load(tiny_model_dir).parameters(), model.load(tmp_path / "dim").parameters(),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(mine, theirs)


def test_an_imported_folder_is_a_whole_model(imported, whole, photos):
    dim = model.load(imported)
    assert dim.painter.takes_source and len(dim.painter.null_condition) == 30
    assert dim.config.understanding.max_condition_tokens == 30
    assert dim.config.painter.architecture["in_channels"] == 5
    assert dim.connector[0].weight.dtype == torch.bfloat16
    assert dim.provenance.sections == ("projector.", "decoder.model.", "decoder.vae.", "mllm.")
    # sides of three and five cells: nothing is square
    connector, painter = released.load(imported.parent / "model.safetensors", **HEADS)
    latent = torch.randn(2, 5, 3, 5)
    for one, other in zip(connector.parameters(), dim.connector.parameters(), strict=True):
        assert torch.equal(one, other)
    condition = connector(torch.randn(2, 7, 128).bfloat16())
    with torch.no_grad():
        expected = painter(latent, 500.0, condition, source_latent=latent)
        velocity = dim.painter(latent, 500.0, condition, source_latent=latent)
    assert torch.equal(velocity, expected)
    [result] = dim.float().edit(photos[:1], ["remove it"], fit="square")
    assert result.image.size == (32, 32)


def test_the_understanding_model_is_copied_or_referred_to(whole, settings, tmp_path):
    file = saved(whole, tmp_path)
    provenance = import_checkpoint(
        file, tmp_path / "dim", config=settings, copy_understanding=False, **HEADS
    )
    assert provenance.left_out == ("mllm.",)
    assert not (tmp_path / "dim" / "understanding").exists()
    assert folder.read_description(tmp_path / "dim").understanding == UNDERSTANDING
    [back] = export_checkpoint(tmp_path / "dim", tmp_path / "back.safetensors")
    assert not any(name.startswith("mllm.") for name in load_file(back))
    [back] = export_checkpoint(tmp_path / "dim", tmp_path / "all.safetensors", understanding=True)
    assert same_tensors(back, file)
    # the classes' own names, a level deeper, are read as well
    deeper = {
        name.replace("mllm.model.", "mllm.model.language_model.").replace(
            "mllm.visual.", "mllm.model.visual."
        ): value
        for name, value in whole.items()
    }
    import_checkpoint(saved(deeper, tmp_path), tmp_path / "deeper", config=settings, **HEADS)
    taken = model.load(tmp_path / "deeper").conditioner.model.state_dict()
    for name, value in model.load(tmp_path / "dim").conditioner.model.state_dict().items():
        assert torch.equal(taken[name], value)


def test_frozen_parts_that_a_checkpoint_lacks_come_from_elsewhere(settings, tmp_path):
    file = saved(published(hidden_size=128), tmp_path)
    provenance = import_checkpoint(
        file, tmp_path / "dim", config=settings, copy_understanding=True, **HEADS
    )
    assert provenance.sections == ("projector.", "decoder.model.")
    assert model.load(tmp_path / "dim").conditioner.hidden_size == 128
    [back] = export_checkpoint(tmp_path / "dim", tmp_path / "back.safetensors")
    assert same_tensors(back, file)
    for part, config in (
        ("autoencoder/diffusion_pytorch_model", settings.autoencoder),
        ("understanding/model", settings.understanding),
    ):
        own = Path(parts.weights_path(config.weights)) / f"{Path(part).name}.safetensors"
        assert same_tensors(tmp_path / "dim" / f"{part}.safetensors", own)
    # a type that is asked for is obeyed, so the part is loaded
    half = settings.autoencoder.model_copy(update={"dtype": "float16"})
    config = settings.model_copy(update={"autoencoder": half})
    import_checkpoint(file, tmp_path / "half", config=config, **HEADS)
    assert summarise(tmp_path / "half").parts[-1].dtypes == ("F16",)
    nowhere = settings.model_copy(update={"autoencoder": AutoencoderConfig()})
    with pytest.raises(CheckpointError, match=r"missing decoder\.vae\.\*, and autoencoder"):
        import_checkpoint(file, tmp_path / "other", config=nowhere, **HEADS)
    nowhere = settings.model_copy(update={"understanding": UnderstandingConfig()})
    with pytest.raises(ConfigError, match=r"understanding\.weights is null"):
        import_checkpoint(file, tmp_path / "other", config=nowhere, **HEADS)


def test_the_text_encoder_is_left_out(settings, tmp_path):
    extra = {"decoder.text_encoder.layers.0.weight": torch.ones(2, dtype=torch.int8)}
    file = saved(published(hidden_size=128) | extra, tmp_path)
    provenance = import_checkpoint(file, tmp_path / "dim", config=settings, **HEADS)
    assert provenance.left_out == ("decoder.text_encoder.",)
    [back] = export_checkpoint(tmp_path / "dim", tmp_path / "back.safetensors")
    assert load_file(file).keys() - load_file(back).keys() == extra.keys()


def test_shards_are_read_and_written(whole, settings, imported, tmp_path):
    (tmp_path / "shards").mkdir()
    specs = {name: tensorfile.spec_of(tensor) for name, tensor in whole.items()}
    tensorfile.write_folder(
        tmp_path / "shards", "model", specs, whole.__getitem__, max_shard_bytes=100_000
    )
    import_checkpoint(
        tmp_path / "shards", tmp_path / "dim", config=settings, max_shard_bytes=40_000, **HEADS
    )
    for part in ("painter", "autoencoder", "understanding"):
        assert len(list((tmp_path / "dim" / part).glob("*-of-*.safetensors"))) > 1, part
    for mine, theirs in zip(
        model.load(tmp_path / "dim").parameters(), model.load(imported).parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    files = export_checkpoint(tmp_path / "dim", tmp_path / "out", max_shard_bytes=200_000)
    assert len(files) > 3 and files[-1].name == "model.safetensors.index.json"
    back = tensorfile.open_folder(tmp_path / "out", "model")
    assert back.keys() == whole.keys()
    assert all(torch.equal(back.read(name), tensor) for name, tensor in whole.items())
    [file] = export_checkpoint(tmp_path / "dim", tmp_path / "one.safetensors")
    assert load_file(file).keys() == whole.keys()


def test_widening_is_asked_for_and_makes_an_edit_painter(settings, tmp_path):
    file = saved(published(hidden_size=128, source=False), tmp_path)
    import_checkpoint(file, tmp_path / "t2i", config=settings, **HEADS)
    import_checkpoint(
        file, tmp_path / "edit", config=settings, changes=Changes(widen=True), task="t2i", **HEADS
    )
    narrow, wide = painter_of(tmp_path / "t2i"), painter_of(tmp_path / "edit")
    assert not narrow.takes_source and wide.takes_source
    assert not folder.read_description(tmp_path / "t2i").config.painter.source_latent
    assert folder.read_description(tmp_path / "edit").config.painter.source_latent
    narrow.widen()
    for one, other in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="source latent's channels already"):
        import_checkpoint(
            saved(published(hidden_size=128), tmp_path),
            tmp_path / "again",
            config=settings,
            changes=Changes(widen=True),
            **HEADS,
        )


@pytest.mark.parametrize("rows", [1, 12, 45])
def test_the_null_tables_length_changes_only_when_asked_for(settings, tmp_path, rows):
    tensors = published(hidden_size=128)
    file = saved(tensors, tmp_path)
    for name in ("one", "other"):
        changes = Changes(null_condition_tokens=rows)
        import_checkpoint(file, tmp_path / name, config=settings, changes=changes, **HEADS)
    one, other = (
        load_file(tmp_path / name / "null_condition.safetensors")["null_condition"]
        for name in ("one", "other")
    )
    assert one.shape == (rows, 20) and torch.equal(one, other)
    kept = min(rows, 30)
    assert torch.equal(one[:kept], tensors["decoder.model.y_embedder.y_embedding"][:kept])
    assert one[kept:].unique().numel() == (rows - kept) * 20
    description = folder.read_description(tmp_path / "one")
    assert description.config.painter.null_condition_tokens == rows
    assert description.config.understanding.max_condition_tokens == rows
    assert description.provenance.null_condition_tokens == 30
    assert len(model.load(tmp_path / "one").painter.null_condition) == rows


def test_an_export_says_its_heads_which_no_tensor_shows(tiny_model_dir, tmp_path):
    [file] = export_checkpoint(tiny_model_dir, tmp_path / "model.safetensors")
    metadata = tensorfile.TensorFiles([file]).metadata
    assert metadata["cross_attention_head_dim"] == "32"
    with pytest.raises(CheckpointError, match="no cross-attention heads of 112"):
        released.load(file)
    connector, painter = released.load(file, cross_attention_head_dim=32)
    dim = model.load(tiny_model_dir)
    for one, other in (
        *zip(connector.parameters(), dim.connector.parameters(), strict=True),
        *zip(painter.parameters(), dim.painter.parameters(), strict=True),
    ):
        assert torch.equal(one, other)


def test_the_provenance_stays_when_the_model_is_saved_again(imported, tmp_path):
    dim = model.load(imported)
    dim.save(tmp_path / "trained")
    assert folder.read_description(tmp_path / "trained").provenance == dim.provenance
    assert dim.provenance.checkpoint == str(imported.parent / "model.safetensors")


def test_all_that_is_wrong_with_every_part_is_listed_at_once(whole, settings, tmp_path):
    tensors = dict(whole)
    for name in (
        "projector.2.bias",
        "decoder.model.blocks.2.attn.k_norm.weight",
        "decoder.vae.encoder.conv_in.weight",
        "mllm.visual.patch_embed.proj.weight",
    ):
        del tensors[name]
    wrong = {
        "decoder.model.blocks.1.attn.qkv.weight": torch.zeros(144, 47),
        "decoder.vae.decoder.conv_in.bias": torch.zeros(3),
        "mllm.model.norm.weight": torch.zeros(127),
        "mllm.visual.merger.ln_q.weight": torch.zeros(96, dtype=torch.int32),
        "mllm.model.layers.7.mlp.up_proj.weight": torch.zeros(1),
        "optimizer.step": torch.zeros(1),
        "decoder.modle.typo": torch.zeros(1),
        "projector.0.weight": torch.zeros(20, 127),
    }
    file = saved(tensors | wrong, tmp_path)
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(file, tmp_path / "dim", config=settings, **HEADS)
    message = str(error.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    for phrase in (
        "missing projector.2.bias",
        "missing decoder.model.blocks.2.attn.k_norm.weight",
        "missing decoder.vae.encoder.conv_in.weight",
        "missing mllm.visual.patch_embed.proj.weight",
        "decoder.model.blocks.1.attn.qkv.weight is (144, 47), not (144, 48)",
        "decoder.vae.decoder.conv_in.bias is (3,), not (20,)",
        "mllm.model.norm.weight is (127,), not (128,)",
        "mllm.visual.merger.ln_q.weight is of type I32",
        "unexpected mllm.model.layers.7.mlp.up_proj.weight",
        "unexpected optimizer.step",
        "unexpected decoder.modle.typo",
        "projector.0.weight takes tokens of 127 features, but",
    ):
        assert phrase in message
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_weights_that_are_no_numbers_are_all_named_and_nothing_is_left(whole, settings, tmp_path):
    names = (
        "projector.2.weight",
        "decoder.model.blocks.0.attn.qkv.weight",
        "decoder.model.y_embedder.y_embedding",
        "decoder.vae.decoder.conv_in.bias",
        "mllm.model.norm.weight",
    )
    tensors = {name: tensor.clone() for name, tensor in whole.items()}
    for name in names:
        tensors[name].view(-1)[-1] = float("nan")
    file = saved(tensors, tmp_path)
    with pytest.raises(CheckpointError, match=f"^{file}: weights that are not finite: ") as error:
        import_checkpoint(file, tmp_path / "dim", config=settings, **HEADS)
    assert all(str(error.value).count(name) == 1 for name in names)
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_files_that_are_no_checkpoint_are_refused(whole, settings, tmp_path):
    def refused(path: Path, message: str) -> None:
        with pytest.raises(CheckpointError, match=message):
            import_checkpoint(path, tmp_path / "dim", config=settings, **HEADS)

    refused(tmp_path / "gone.safetensors", "checkpoint not found: .*gone")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "empty holds neither model.safetensors nor ")
    file = saved(whole, tmp_path)
    os.truncate(file, file.stat().st_size - 1)
    refused(file, "model.safetensors is not a readable safetensors file: ")
    file.write_text("hello")
    refused(file, "model.safetensors is not a readable safetensors file: ")
    assert not (tmp_path / "dim").exists()


@pytest.mark.parametrize("source", [True, False])
def test_a_checkpoint_of_the_other_task_is_refused(settings, tmp_path, source):
    file = saved(published(hidden_size=128, source=source), tmp_path)
    mine, other = ("edit", "t2i") if source else ("t2i", "edit")
    message = (
        "is an edit checkpoint .10 input channels for latents of 5., where a text-to-image one"
        if source
        else "is a text-to-image checkpoint .5 input channels for latents of 5., where an edit one"
    )
    with pytest.raises(CheckpointError, match=message):
        import_checkpoint(file, tmp_path / "dim", config=settings, task=other, **HEADS)
    provenance = import_checkpoint(file, tmp_path / "dim", config=settings, task=mine, **HEADS)
    assert provenance.task == mine


def test_an_autoencoder_of_other_latents_is_refused(settings, tmp_path):
    file = saved(published(hidden_size=128, channels=4), tmp_path)
    with pytest.raises(CheckpointError, match="latents have 4 channels, the autoencoder's have 5"):
        import_checkpoint(file, tmp_path / "dim", config=settings, **HEADS)


def test_frozen_parts_that_cannot_be_read_are_named_with_the_rest(settings, tmp_path):
    tensors = published(hidden_size=128)
    del tensors["projector.2.bias"]
    places = {"understanding": UnderstandingConfig, "autoencoder": AutoencoderConfig}
    for name in places:
        (tmp_path / name).mkdir()
    sections = {name: kind(weights=str(tmp_path / name)) for name, kind in places.items()}
    config = settings.model_copy(update=sections)
    with pytest.raises(CheckpointError, match=r"missing projector\.2\.bias; ") as error:
        import_checkpoint(saved(tensors, tmp_path), tmp_path / "dim", config=config, **HEADS)
    for name in places:
        assert f"cannot load weights from {tmp_path / name}: " in str(error.value)


def test_a_frozen_parts_own_folder_is_checked_too(settings, autoencoder, tmp_path):
    file = saved(published(hidden_size=128), tmp_path)
    place = shutil.copytree(autoencoder, tmp_path / "vae")
    weights = place / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.weight"]
    save_file(tensors | {"decoder.conv_in.bias": torch.zeros(3)}, weights)
    config = settings.model_copy(
        update={"autoencoder": AutoencoderConfig(weights=str(place))},
    )
    with pytest.raises(CheckpointError) as error:
        import_checkpoint(file, tmp_path / "dim", config=config, **HEADS)
    assert f"missing {place}: encoder.conv_in.weight" in str(error.value)
    assert f"{place}: decoder.conv_in.bias is (3,), not (20,)" in str(error.value)


def test_nothing_but_a_model_is_replaced(imported, settings, tmp_path):
    file = imported.parent / "model.safetensors"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(InputError, match="not a DIM folder; it is left as it is"):
        import_checkpoint(file, tmp_path / "mine", config=settings, **HEADS)
    with pytest.raises(InputError, match="is not an empty folder; it is left as it is"):
        export_checkpoint(imported, tmp_path / "mine")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(InputError, match="is a folder, not a safetensors file"):
        export_checkpoint(imported, tmp_path / "folder.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "mine"]
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        export_checkpoint(imported, tmp_path / "file" / "x.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "model folder not found"),
        (lambda p: (p / "dim.json").unlink(), "is not a DIM folder"),
        (lambda p: (p / "connector.safetensors").unlink(), "not found: .*connector.safetensors"),
        (lambda p: os.truncate(p / "null_condition.safetensors", 90), "null_.*not a readable"),
        (lambda p: shutil.rmtree(p / "painter"), "checkpoint not found: .*painter"),
        (lambda p: shutil.rmtree(p / "autoencoder"), "checkpoint not found: .*autoencoder"),
        (lambda p: (p / "painter" / "config.json").unlink(), "painter/config.json is damaged"),
        (lambda p: _without(p, "to_q"), "painter lacks parts of .*blocks.0.attn.qkv.weight"),
        (lambda p: _without(p, "attn1.to_out"), "missing decoder.model.blocks.0.attn.proj.bias"),
        (lambda p: _with(p, "lora.weight", torch.ones(1)), "no place for the painter's lora"),
        (
            lambda p: _with(p, "transformer_blocks.0.attn1.to_k.weight", torch.ones(47, 48)),
            "to_v.weight differ in shape or type",
        ),
        (
            lambda p: _with(p, "caption_norm.weight", torch.full((48,), torch.nan)),
            "not finite: decoder.model.attention_y_norm.weight",
        ),
    ],
)
def test_a_damaged_folder_is_not_exported(imported, tmp_path, damage, message):
    path = shutil.copytree(imported, tmp_path / "dim")
    damage(path)
    with pytest.raises(CheckpointError, match=message) as error:
        export_checkpoint(path, tmp_path / "out.safetensors")
    assert "\n" not in str(error.value) and not (tmp_path / "out.safetensors").exists()


def _without(path: Path, part: str) -> None:
    file = path / "painter" / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if part not in k}, file)


def _with(path: Path, name: str, tensor: torch.Tensor) -> None:
    file = path / "painter" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file) | {name: tensor}, file)


def test_an_understanding_model_out_of_reach_is_not_exported(imported, tmp_path):
    path = shutil.copytree(imported, tmp_path / "dim")
    description = json.loads((path / "dim.json").read_text())
    (path / "dim.json").write_text(json.dumps(description | {"understanding": ELSEWHERE}))
    assert export_checkpoint(path, tmp_path / "out.safetensors")
    with pytest.raises(InputError, match=f"refers to the understanding model {ELSEWHERE}"):
        export_checkpoint(path, tmp_path / "out.safetensors", understanding=True)


def test_a_summary_reads_no_weights(imported, whole, monkeypatch):
    monkeypatch.delattr(tensorfile.TensorFiles, "read")
    summary = summarise(imported)
    counts = {part.name: part.parameters for part in summary.parts}

    def counted(prefix: str) -> int:
        return sum(t.numel() for name, t in whole.items() if name.startswith(prefix))

    unseen = whole[released.UNUSED].numel() + whole[released.NULL_TABLE].numel()
    assert counts == {
        "understanding": counted("mllm."),
        "connector": counted("projector."),
        "painter": counted("decoder.model.") - unseen,
        "null table": 30 * 20,
        "autoencoder": counted("decoder.vae."),
    }
    assert summary.parts[2].dtypes == ("BF16",) and summary.parts[2].nbytes == 2 * counts["painter"]
    assert (summary.stage, summary.sizes["layers"], summary.sizes["width"]) == ("edit", 3, 48)
    assert summary.sizes["input channels"] == 2 * summary.sizes["latent channels"] == 10
    assert summary.sizes["self-attention heads"] == 6
    assert summary.sizes["cross-attention heads"] == 8
