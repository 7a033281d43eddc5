"""Files that are no adapter, or another model's: one sentence that names file and key."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dim import model as models
from dim.errors import CheckpointError
from dim.model import DIM
from dim.model.lora.adapter import LORA_FILE, MORE_FILE, read_adapter
from tests.dim.model.lora.adapters import EVERYTHING, make_adapter

LAYER = "transformer.transformer_blocks.0.attn1.to_q"
Tensors = dict[str, torch.Tensor]
Header = dict[str, object]


@pytest.fixture(scope="module")
def whole(editor: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter") / "whole"
    return make_adapter(editor, folder, **EVERYTHING)


def shapes_of(model: DIM) -> dict[str, tuple[int, ...]]:
    parts = {"transformer": model.painter.network, "connector": model.connector}
    shapes = {
        f"{part}.{name}": tuple(each.shape)
        for part, module in parts.items()
        for name, each in module.state_dict().items()
    }
    return shapes | {"null_condition": tuple(model.painter.null_condition.shape)}


def header(file: Path) -> Header:
    with safe_open(file, framework="pt") as reader:
        return json.loads(reader.metadata()["lora_adapter_metadata"])


def changed(folder: Path, name: str, change: Callable[[Tensors, Header], None]) -> None:
    """Write the file ``name`` of an adapter anew, with other tensors or another header."""
    tensors, said = load_file(folder / name), header(folder / name)
    change(tensors, said)
    metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(said)}
    save_file(tensors, folder / name, metadata=metadata)


def drop(tensors: Tensors, key: str) -> None:
    del tensors[key]


BAD: dict[str, tuple[str, Callable[[Tensors, Header], None], str]] = {
    "a half is missing": (
        LORA_FILE,
        lambda t, h: drop(t, f"{LAYER}.lora_B.weight"),
        f"missing {LAYER}.lora_B.weight, beside {LAYER}.lora_A.weight",
    ),
    "ranks differ": (
        LORA_FILE,
        lambda t, h: t.update({f"{LAYER}.lora_A.weight": torch.zeros(3, 128)}),
        f"{LAYER}: lora_A (3, 128) and lora_B (128, 4) have no common rank",
    ),
    "the header's rank differs": (
        LORA_FILE,
        lambda t, h: h.update({"transformer.r": 8}),
        "lora_A.weight: the header says rank 8, the tensor has 4",
    ),
    "another size": (
        LORA_FILE,
        lambda t, h: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 64)}),
        f"{LAYER}: lora_A (4, 64) and lora_B (128, 4) do not make the model's (128, 128)",
    ),
    "another model": (
        LORA_FILE,
        lambda t, h: t.update({"transformer.single_blocks.0.lora_A.weight": torch.zeros(1, 1)}),
        "transformer.single_blocks.0.lora_A.weight: not an adapter's key for this model",
    ),
    "a whole weight in diffusers' file": (
        LORA_FILE,
        lambda t, h: t.update({f"{LAYER}.weight": torch.zeros(128, 128)}),
        f"{LAYER}.weight: not an adapter's key",
    ),
    "no numbers": (
        LORA_FILE,
        lambda t, h: t[f"{LAYER}.lora_A.weight"].fill_(torch.nan),
        f"not finite: {LAYER}.lora_A.weight",
    ),
    "whole numbers": (
        LORA_FILE,
        lambda t, h: t.update({f"{LAYER}.lora_A.weight": torch.zeros(4, 128, dtype=torch.int8)}),
        f"{LAYER}.lora_A.weight is of type I8",
    ),
    "alpha is no number": (
        LORA_FILE,
        lambda t, h: h.update({"transformer.lora_alpha": "much"}),
        "lora_adapter_metadata in its header: transformer.lora_alpha",
    ),
    "a pattern that is no name": (
        LORA_FILE,
        lambda t, h: h.update({"transformer.alpha_pattern": {"(a+)+$": 3}}),
        "'(a+)+$' in the header is no layer's name",
    ),
    "nothing": (LORA_FILE, lambda t, h: t.clear(), "is empty"),
    "half a patch embedding": (
        MORE_FILE,
        lambda t, h: drop(t, "transformer.patch_embed.proj.bias"),
        "missing transformer.patch_embed.proj.bias, beside transformer.patch_embed.proj.weight",
    ),
    "another null table": (
        MORE_FILE,
        lambda t, h: t.update({"null_condition": torch.zeros(5, 96)}),
        "null_condition is (5, 96), not (512, 96)",
    ),
    "another part": (
        MORE_FILE,
        lambda t, h: t.update({"autoencoder.weight": torch.zeros(1)}),
        "autoencoder.weight: not an adapter's key",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_said_with_file_and_key(
    name: str, whole: Path, editor: Path, tmp_path: Path
) -> None:
    file, change, said = BAD[name]
    folder = tmp_path / "bad"
    shutil.copytree(whole, folder)
    changed(folder, file, change)
    with pytest.raises(CheckpointError) as error:
        models.load(editor, lora=[str(folder)])
    assert str(folder / file) in str(error.value) and said in str(error.value)
    assert "\n" not in str(error.value)


def test_pickles_are_never_read(editor: Path, tmp_path: Path) -> None:
    class Opened:
        def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
            return Path.touch, (tmp_path / "opened",)  # type: ignore[return-value]

    data = pickle.dumps(Opened())
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "pytorch_lora_weights.bin").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"pytorch_lora_weights.bin is a pickle"):
        models.load(editor, lora=[str(folder)])
    (folder / LORA_FILE).write_bytes(data)
    for place in (folder, folder / LORA_FILE, folder / "pytorch_lora_weights.bin"):
        with pytest.raises(CheckpointError, match="not a readable safetensors file"):
            models.load(editor, lora=[str(place)])
    assert not (tmp_path / "opened").exists()


def test_a_file_is_read_with_what_lies_beside_it(whole: Path, editor: Path) -> None:
    shapes = shapes_of(models.load(editor))
    for place in (whole, whole / LORA_FILE):
        adapter = read_adapter(place, shapes)
        assert {"connector.0.weight", f"{LAYER}.weight"} <= adapter.added.keys()
        assert adapter.replaced.keys() == {
            "null_condition",
            "transformer.patch_embed.proj.weight",
            "transformer.patch_embed.proj.bias",
        }
        assert adapter.added[f"{LAYER}.weight"].scale == 1.5


def test_other_peoples_headers_scale_as_peft_does(
    whole: Path, editor: Path, tmp_path: Path
) -> None:
    network = models.load(editor).painter.network
    layers = [name.removeprefix("transformer.") for name in (LAYER, LAYER.replace("_q", "_k"))]
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        target_modules=layers,
        alpha_pattern={"^transformer_blocks.0.attn1.to_q": 7},
    )
    network.add_adapter(config)
    network.save_lora_adapter(tmp_path)
    tensors = load_file(tmp_path / LORA_FILE)
    metadata = {f"transformer.{key}": value for key, value in header(tmp_path / LORA_FILE).items()}
    save_file(
        {f"transformer.{key}": tensor for key, tensor in tensors.items()},
        tmp_path / "theirs.safetensors",
        metadata={"lora_adapter_metadata": json.dumps(metadata)},
    )
    shapes = shapes_of(models.load(editor))
    adapter = read_adapter(tmp_path / "theirs.safetensors", shapes)
    scales = {name: low.scale for name, low in adapter.added.items()}
    blocks = network.transformer_blocks[0].attn1
    assert scales == {
        f"{LAYER}.weight": blocks.to_q.scaling["default"],
        f"{LAYER.replace('_q', '_k')}.weight": blocks.to_k.scaling["default"],
    }
    save_file(
        {f"transformer.{key}": tensor for key, tensor in tensors.items()},
        tmp_path / "old.safetensors",
    )
    old = read_adapter(tmp_path / "old.safetensors", shapes)
    assert {low.scale for low in old.added.values()} == {1.0}
