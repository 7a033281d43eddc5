from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dim import model
from dim.errors import CheckpointError, ConfigError, InputError
from dim.features.encoder import CachedFeatures, FrozenEncoder, LiveFeatures
from dim.features.shards import Share
from infra.samples import open_images
from tests.conftest import ROOT
from training.data import make_order
from training.mixture import describe_mixture
from training.plan import Plan, absolute, announcement, measure, resumption
from training.stage import StageConfig
from training.state import TrainState


def stage(data: str | list[Any], init: str | Path, **changes: Any) -> StageConfig:
    data = [data] if isinstance(data, str) else data
    values = {"stage": "edit1", "init": str(init), "data": data, "out": "o", "batch_size": 6}
    return StageConfig.model_validate(values | {"learning_rate": 1, "epochs": 4} | changes)


def said(
    config: StageConfig, features: Any, sources: Sequence[int] = (), **options: Any
) -> list[str]:
    plan = Plan(config=config, steps=12, rows=20, sources=list(sources), tracking_uri="", run_id="")
    module = nn.Linear(1000, 1000)
    module.bias.requires_grad_(False)
    state = TrainState(module, [torch.optim.SGD(module.parameters())], None)
    options = {"token_limit": 512} | options
    return announcement(plan, state, features, **options).splitlines()


def test_epochs_are_steps_and_the_data_are_counted(edit_data: str, tiny_model_dir: Path) -> None:
    assert measure(stage(edit_data, tiny_model_dir)) == (4 * 3, 20)
    assert measure(stage(edit_data, tiny_model_dir, batch_size=64)) == (4, 20)
    assert measure(stage(edit_data, tiny_model_dir, epochs=None, steps=7)) == (7, 20)


def test_an_epoch_of_mixed_sources_is_as_long_as_its_parts(
    edit_data: str, held_out_data: str, tiny_model_dir: Path
) -> None:
    repeated = [{"uri": edit_data, "repeats": 1.5}, {"uri": held_out_data, "cap": 4}]
    assert measure(stage(repeated, tiny_model_dir)) == (4 * (34 // 6), 25)
    weighted = [{"uri": edit_data, "weight": 3}, {"uri": held_out_data, "weight": 1}]
    config = stage(weighted, tiny_model_dir)
    steps, rows = measure(config)  # of the smaller source 50 at least
    assert (steps, rows) == (4 * 34, 25)
    told = describe_mixture(config, [20, 5])
    assert told.startswith("75.0% ") and told.endswith(" (5 samples, 10.2 times each)")
    plan = Plan(config=config, steps=steps, rows=rows, sources=[20, 5], tracking_uri="", run_id="")
    assert plan.steps_per_epoch == 34
    assert make_order(plan, model.load(tiny_model_dir)).steps_per_epoch == 34
    nothing = [{"uri": edit_data, "repeats": 0.01}, held_out_data]
    with pytest.raises(InputError, match="0.01 of the 20 samples of .* is none"):
        measure(stage(nothing, tiny_model_dir))


def test_what_is_not_there_is_named(
    edit_data: str, tiny_model_dir: Path, t2i_data: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match="no model folder or model YAML at /nowhere"):
        measure(stage(edit_data, "/nowhere"))
    with pytest.raises(InputError, match=f"the training data in {t2i_data} lacks"):
        measure(stage(edit_data, tiny_model_dir, validation={"data": [t2i_data]}))
    config = tmp_path / "model.yaml"
    tiny = (ROOT / "configs" / "tiny.yaml").read_text()
    config.write_text(tiny.replace("package:tiny/understanding", "null"))
    with pytest.raises(InputError, match=r"model\.yaml has a random understanding model"):
        measure(stage(edit_data, config, export_understanding="reference"))


def test_a_model_that_saw_regions_is_not_trained_on_whole_sources(
    edit_data: str, t2i_data: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    init = tmp_path / "region"
    init.mkdir()
    description = json.loads((tiny_model_dir / "dim.json").read_text())
    description["config"]["understanding"]["vlm_view"] = "region"
    (init / "dim.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="region was trained with vlm_view: region") as caught:
        measure(stage(edit_data, init))
    assert "\n" not in str(caught.value) and "set vlm_view" in str(caught.value)
    for start in (init, tiny_model_dir):  # from what is published it is how one begins
        assert measure(stage(edit_data, start, vlm_view="region"))[1] == 20
    assert measure(stage(t2i_data, init, stage="t2i"))[1] == 12


def test_local_paths_are_made_absolute_and_others_stay() -> None:
    held_out = {"data": ["held", "s3://b/held?endpoint_override=http://127.0.0.1:1&region=x"]}
    config = absolute(stage("some/data", "model", validation=held_out))
    here = os.getcwd()
    assert config.init == f"{here}/model" and config.out == f"{here}/o"
    assert config.uris == [f"{here}/some/data"]
    assert config.validation is not None
    assert config.validation.data == [f"{here}/held", held_out["data"][1]]


@pytest.fixture(scope="module")
def samples(edit_data: str) -> Share:
    images = open_images([edit_data], ["id", "image", "image_target", "instruction"])
    return Share(images, np.arange(6))


def test_memory_and_what_was_cut_are_announced(
    edit_data: str, tiny_model_dir: Path, samples: Share
) -> None:
    encoder = FrozenEncoder(model.load(tiny_model_dir), edits=True, resolution=64)
    cached = CachedFeatures(encoder, samples, ["instruction"])
    config = stage(edit_data, tiny_model_dir)
    lines = said(config, cached, token_limit=1)
    assert lines == [
        "edit1: 20 samples, 3 steps an epoch, 12 steps; per worker 1,000,000 trained parameters "
        f"(16 MB with optimizer) and {cached.nbytes / 1e6:.0f} MB of cached features",
        "6 texts fill all 1 condition tokens; longer ones were cut",
    ]
    live = LiveFeatures(encoder, samples, ["instruction"])
    (line,) = said(config, live)
    assert line.endswith("and 0 MB of cached features")
    (line,) = said(config.model_copy(update={"optimizer": "adamw8bit"}), live)
    assert "1,000,000 trained parameters (10 MB with optimizer)" in line


def test_few_samples_and_a_run_that_goes_on_are_announced(
    edit_data: str, tiny_model_dir: Path, samples: Share
) -> None:
    live = LiveFeatures(
        FrozenEncoder(model.load(tiny_model_dir), edits=True, resolution=64),
        samples,
        ["instruction"],
    )
    config = stage(edit_data, tiny_model_dir)
    plan = Plan(config=config, steps=12, rows=20, tracking_uri="", run_id="")
    state = TrainState(nn.Linear(1, 1), [], None, 7)
    assert resumption(plan, state) == "resumed after step 7 of 12 (epoch 2, batch 1 of 3)"
    two = [{"uri": edit_data, "repeats": 2, "cap": 10}, {"uri": "x/other", "name": "mine"}]
    mixed = stage(two, tiny_model_dir)
    lines = said(mixed, live, sources=[15, 5])
    assert ", 4 steps an epoch" in lines[0]
    name = Path(edit_data).name
    assert lines[1] == (
        f"an epoch has 80.0% {name} (10 of 15 samples, 2 times each), 20.0% mine (5 samples, "
        "1 times each)"
    )
    lines = said(config.model_copy(update={"batch_size": 32}), live)
    assert lines[1:] == ["20 samples are fewer than a batch of 32: they repeat in it"]
