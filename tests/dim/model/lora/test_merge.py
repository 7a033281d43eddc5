"""Adapters in weights: the same numbers as beside them, taken out to the bit, several by weight."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dim import model as models
from dim.errors import CheckpointError, InputError
from dim.model import DIM
from dim.model.lora import layers
from dim.model.lora.adapter import MORE_FILE, VIEW_KEY, Adapter, LowRank
from dim.model.lora.merge import Weighted, check_folder, merge, merge_folder, merged, parse
from dim.model.lora.settings import LoraSettings
from tests.dim.model.lora.adapters import EVERYTHING, make_adapter, velocity, with_adapter


def weights(model: DIM) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank": 4},
        EVERYTHING,
        {"rank": 2, "targets": ["to_q", "ff", "proj_out", "time_embed"], "train": ["connector"]},
    ],
    ids=["attention and connector", "everything", "convolutions and a whole connector"],
)
def test_merged_weights_give_what_the_adapter_gives(
    editor: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", **settings)
    beside = velocity(with_adapter(editor, **settings))
    base, merged = models.load(editor), models.load(editor, lora=[str(adapter)])
    assert (velocity(merged) - beside).abs().max() < 1e-6 * beside.abs().max()
    assert (velocity(base) - beside).abs().max() > 1e-3


def test_unmerging_restores_the_same_bits(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", **EVERYTHING)
    model = models.load(editor, dtype="bfloat16")
    before = weights(model)
    merged = merge(model, [f"{adapter}:0.7"])
    assert not same(weights(model), before)
    merged.unmerge()
    assert same(weights(model), before)


@pytest.mark.parametrize("settings", [{}, {"targets": ["to_q"]}], ids=["connector", "painter"])
def test_an_adapter_that_was_learnt_on_regions_shows_regions(
    editor: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    learner = with_adapter(editor, **settings)
    learner.config = learner.config.showing("region")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    layers.save(learner, LoraSettings.model_validate(settings), adapter)
    plain = make_adapter(editor, tmp_path / "plain", seed=1)

    def seen(model: DIM) -> str:
        return model.config.understanding.vlm_view

    model = models.load(editor)
    merged = merge(model, [str(adapter), f"{plain}:0.5"])
    assert seen(model) == "region"
    merged.unmerge()
    assert seen(model) == "whole"
    assert seen(models.load(editor, lora=[f"{adapter}:0"])) == "whole"
    merge_folder(editor, [str(adapter)], tmp_path / "out")
    again = models.load(tmp_path / "out")
    in_memory = models.load(editor, lora=[str(adapter)])
    assert seen(again) == "region" and same(weights(again), weights(in_memory))


def test_adapters_of_unlike_views_do_not_go_together(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter")
    with safe_open(adapter / MORE_FILE, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        said = file.metadata()
    assert VIEW_KEY not in said  # as published, and as adapters of before there were views

    def that_says(view: str) -> str:
        shutil.copytree(adapter, tmp_path / view)
        save_file(tensors, tmp_path / view / MORE_FILE, metadata=said | {VIEW_KEY: view})
        return str(tmp_path / view)

    both = [that_says("region"), that_says("whole")]
    for refusing in (
        lambda: models.load(editor, lora=both),
        lambda: merge_folder(editor, both, tmp_path / "out"),
        lambda: check_folder(editor, both),
    ):
        with pytest.raises(InputError, match="do not go together"):
            refusing()
    with pytest.raises(CheckpointError, match=f"{VIEW_KEY} in its header: 'half' is not known"):
        models.load(editor, lora=[that_says("half")])


def test_a_weight_of_zero_changes_no_bit(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", **EVERYTHING)
    model = models.load(editor, lora=[f"{adapter}:0"])
    assert same(weights(model), weights(models.load(editor)))
    change = LowRank(torch.ones(1, 2), torch.ones(2, 1), 1.0)
    base = torch.tensor([[-0.0, 1.0], [2.0, 3.0]])  # a sum with zeros would turn -0.0 into 0.0
    assert merged("layer", base, [Weighted(Adapter({"layer": change}, {}), 0.0)]) is base


def test_several_adapters_add_up_by_weight(editor: Path, tmp_path: Path) -> None:
    one = make_adapter(editor, tmp_path / "one", seed=1, **EVERYTHING)
    two = make_adapter(editor, tmp_path / "two", seed=2, rank=2, train=["null_condition"])
    base = weights(models.load(editor))
    first, second = (weights(models.load(editor, lora=[str(x)])) for x in (one, two))
    both = weights(models.load(editor, lora=[f"{one}:0.5", f"{two}:-2"]))
    for name, tensor in base.items():
        expected = tensor + 0.5 * (first[name] - tensor) - 2 * (second[name] - tensor)
        torch.testing.assert_close(both[name], expected, rtol=0, atol=1e-6)
    twice = weights(models.load(editor, lora=[f"{one}:0.5", f"{one}:0.5"]))
    for name, tensor in first.items():
        torch.testing.assert_close(twice[name], tensor, rtol=0, atol=1e-6)


def test_a_part_that_was_trained_as_a_whole_comes_out_to_the_bit(
    editor: Path, tmp_path: Path
) -> None:
    settings = EVERYTHING | {"targets": ["to_q"], "train": ["connector", "null_condition"]}
    adapter = make_adapter(editor, tmp_path / "adapter", **settings)
    learnt = with_adapter(editor, **settings)
    merged = models.load(editor, lora=[str(adapter)])
    assert same(weights(merged.connector), weights(learnt.connector))
    assert torch.equal(merged.painter.null_condition, learnt.painter.null_condition)


def test_a_folder_is_merged_as_a_model_in_memory_is(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", **EVERYTHING)
    specs = [f"{adapter}:0.5"]
    merge_folder(editor, specs, tmp_path / "out", max_shard_bytes=500_000)
    assert len(list((tmp_path / "out" / "painter").glob("*.safetensors"))) > 1
    in_memory = models.load(editor, lora=specs)
    assert same(weights(models.load(tmp_path / "out")), weights(in_memory))


def test_a_folder_merged_with_nothing_of_an_adapter_has_the_same_files(
    editor: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", **EVERYTHING)
    merge_folder(editor, [f"{adapter}:0"], tmp_path / "out")
    files = [path for path in editor.rglob("*") if path.is_file()]
    made = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert len(files) == len(made)
    for file in files:
        assert (tmp_path / "out" / file.relative_to(editor)).read_bytes() == (file.read_bytes()), (
            file
        )


def test_the_model_itself_and_other_folders_are_left_alone(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", rank=1)
    with pytest.raises(InputError, match="is the model itself"):
        merge_folder(editor, [str(adapter)], editor / ".")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("bread")
    with pytest.raises(InputError, match="not a DIM folder"):
        merge_folder(editor, [str(adapter)], tmp_path / "notes")
    with pytest.raises(CheckpointError, match="model folder not found"):
        merge_folder(tmp_path / "nowhere", [str(adapter)], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_paths_and_weights(tmp_path: Path) -> None:
    assert parse("a/b") == (Path("a/b"), 1.0)
    assert parse("a/b:0.8") == (Path("a/b"), 0.8)
    assert parse("a:b:-1") == (Path("a:b"), -1.0)
    (tmp_path / "a:1").mkdir()
    assert parse(f"{tmp_path}/a:1") == (tmp_path / "a:1", 1.0)
    with pytest.raises(InputError, match="'much' is no weight"):
        parse("a/b:much")
    for weight in ("inf", "nan"):
        with pytest.raises(InputError, match="must be finite"):
            parse(f"a/b:{weight}")


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was(
    editor: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", rank=1)
    model = models.load(editor)
    before = weights(model)
    with pytest.raises(CheckpointError, match="not found"):
        merge(model, [str(adapter), str(tmp_path / "gone")])
    assert same(weights(model), before)


def test_weights_beyond_a_types_range_are_refused(editor: Path, tmp_path: Path) -> None:
    adapter = make_adapter(editor, tmp_path / "adapter", rank=1)
    model = models.load(editor, dtype="float16")
    before = weights(model)
    with pytest.raises(CheckpointError, match="no longer finite"):
        merge(model, [f"{adapter}:1e9"])
    assert same(weights(model), before)
    merge_folder(editor, [str(adapter)], tmp_path / "out")
    with pytest.raises(CheckpointError, match="no longer finite"):
        merge_folder(editor, [f"{adapter}:1e39"], tmp_path / "out")
    merged = models.load(editor, lora=[str(adapter)])
    assert same(weights(models.load(tmp_path / "out")), weights(merged))
