from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from dim.errors import CheckpointError
from dim.model.checkpoint import tensorfile
from dim.model.checkpoint.tensorfile import Spec, TensorFiles


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.half": torch.randn(3, 5, generator=generator).half(),
        "a.brain": torch.randn(7, generator=generator).bfloat16(),
        "c.single": torch.randn(2, 3, 2, generator=generator),
        "double": torch.randn(4, generator=generator).double(),
        "ä.scalar": torch.tensor(1.5),
        "none": torch.zeros(0, 4),
    }


def specs(tensors: dict[str, torch.Tensor]) -> dict[str, Spec]:
    return {name: tensorfile.spec_of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_the_bytes_are_those_of_the_library(tensors, tmp_path, metadata):
    save_file(tensors, tmp_path / "theirs", metadata)
    tensorfile.write(tmp_path / "ours", specs(tensors), tensors.__getitem__, metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_headers_and_tensors_are_read(tensors, tmp_path):
    save_file(tensors, tmp_path / "file.safetensors", {"format": "pt"})
    files = tensorfile.open_folder(tmp_path, "file")
    assert dict(files) == specs(tensors) and files.metadata == {"format": "pt"}
    assert (files["b.half"].count, files["b.half"].nbytes) == (15, 30)
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
    rows = files.read("b.half", slice(1, 3))
    assert torch.equal(rows, tensors["b.half"][1:3])
    assert rows.untyped_storage().nbytes() == rows.nbytes


def test_what_is_larger_than_a_shard_is_divided(tensors, tmp_path):
    tensorfile.write_folder(
        tmp_path, "model", specs(tensors), tensors.__getitem__, max_shard_bytes=50
    )
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert [shard.name[:19] for shard in shards] == [f"model-{n:05}-of-0000" for n in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    files = tensorfile.open_folder(tmp_path, "model")
    for name, tensor in tensors.items():
        assert torch.equal(files.read(name), tensor)
        assert name in load_file(tmp_path / index["weight_map"][name])
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=f"files that are not there: {shards[1].name}"):
        tensorfile.open_folder(tmp_path, "model")
    save_file({"x": torch.zeros(1)}, shards[1])
    with pytest.raises(CheckpointError, match="tensors that its files lack: "):
        tensorfile.open_folder(tmp_path, "model")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="index.json is damaged"):
        tensorfile.open_folder(tmp_path, "model")


def test_a_tensor_of_another_shape_than_announced_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="x is .*2.*, not .*3"):
        tensorfile.write(tmp_path / "file", {"x": Spec("F32", (3,))}, lambda name: torch.zeros(2))


def test_a_type_that_weights_do_not_have_is_named(tmp_path):
    save_file({"x": torch.zeros(2, dtype=torch.int8)}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match="I8"):
        TensorFiles([tmp_path / "file.safetensors"])["x"].nbytes  # noqa: B018


@pytest.mark.parametrize("length", [0, 4, 100, -1])
def test_a_file_that_is_cut_off_is_refused(tensors, tmp_path, length):
    file = tmp_path / "file.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CheckpointError, match="file.safetensors is not a readable safetensors"):
        TensorFiles([file])


def test_a_file_or_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="checkpoint not found: .*gone"):
        TensorFiles([tmp_path / "gone"])
    with pytest.raises(CheckpointError, match="checkpoint not found: .*gone"):
        tensorfile.open_folder(tmp_path / "gone", "model")
    with pytest.raises(CheckpointError, match=r"holds neither model\.safetensors nor"):
        tensorfile.open_folder(tmp_path, "model")
