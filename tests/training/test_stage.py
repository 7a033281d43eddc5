from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dim.config import dump_config, load_config, load_part, validate_config
from dim.errors import ConfigError
from dim.learning.config import StageInputs
from training.stage import ParallelismConfig, StageConfig, learning_rate_at

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALL = {
    "stage": "edit1",
    "init": "m",
    "data": ["d"],
    "out": "o",
    "steps": 10,
    "batch_size": 4,
    "learning_rate": 1.0,
}


def stage(**changes: object) -> StageConfig:
    return validate_config(StageConfig, SMALL | changes, where="test.yaml")


def test_text_to_image_has_no_view_of_a_source() -> None:
    assert (stage().buckets, stage().vlm_view) == (False, "whole")
    assert stage(vlm_view="region", buckets=True).vlm_view == "region"
    with pytest.raises(ConfigError, match="shows the understanding model no image"):
        stage(stage="t2i", vlm_view="region")


def test_the_published_stages_prepare_samples_as_published() -> None:
    for name in ("t2i", "edit1", "edit2"):
        published = load_config(StageConfig, CONFIGS / f"dim-4.6b-{name}.yaml")
        assert (published.buckets, published.vlm_view) == (False, "whole")


@pytest.mark.parametrize("size", ["tiny", "dim-4.6b"])
@pytest.mark.parametrize("name", ["t2i", "edit1", "edit2"])
def test_shipped_stage_files_are_valid(size: str, name: str) -> None:
    assert load_config(StageConfig, CONFIGS / f"{size}-{name}.yaml").stage == name


@pytest.mark.parametrize(
    ("name", "rate", "batch", "epochs"),
    [("t2i", 2e-5, 256, 8), ("edit1", 1e-4, 32, 10), ("edit2", 1e-5, 32, 50)],
)
def test_published_stages_hold_the_papers_numbers(
    name: str, rate: float, batch: int, epochs: int
) -> None:
    config = load_config(StageConfig, CONFIGS / f"dim-4.6b-{name}.yaml")
    assert (config.learning_rate, config.batch_size, config.epochs) == (rate, batch, epochs)
    assert config.condition_dropout == 0.1 and config.changed_cell_weight == 1
    assert config.schedule == "constant" and config.ema_decay is None


def test_the_text_follows_from_the_stage() -> None:
    assert stage(stage="t2i").texts == ("caption",)
    assert stage(stage="edit1").texts == ("instruction",)
    assert stage(stage="edit2").texts == ("blueprint",)
    assert stage(stage="edit2", text="instruction").texts == ("instruction",)


def test_mixed_texts() -> None:
    config = stage(text_mix={"instruction": 1, "blueprint": 9})
    assert config.texts == ("blueprint", "instruction")
    assert config.text_shares == (0.9, 0.1)
    assert config.validation_text == "blueprint"
    assert config.columns == ["id", "image", "image_target", "blueprint", "instruction"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rat": 1}, r"unknown key 'learning_rat' \(did you mean 'learning_rate'\?\)"),
        ({"steps": None}, "exactly one of steps and epochs"),
        ({"epochs": 3}, "exactly one of steps and epochs"),
        ({"workers": 5}, "batch_size 4 leaves some of 5 workers without a sample"),
        ({"workers": [1, 5]}, "batch_size 4 leaves some of 5 workers without a sample"),
        ({"workers": [3, 2]}, r"workers \[3, 2\]: the fewest stand first"),
        ({"workers": [0, 2]}, "workers"),
        ({"workers": [1, 2, 3]}, "workers"),
        (
            {"workers": [2, 4], "parallelism": {"strategy": "hsdp", "shard": 2}},
            "strategy hsdp goes with a fixed number of workers: not all numbers from 2 to 4 divide",
        ),
        (
            {"workers": [2, 4], "parallelism": {"strategy": "fsdp", "shard": 4}},
            "strategy fsdp on 2 workers has shard 2, not 4: leave shard out",
        ),
        (
            {"workers": [1, 4], "parallelism": {"strategy": "fsdp"}, "ema_on_cpu": True},
            "ema_on_cpu goes with strategy ddp",
        ),
        ({"parallelism": {"strategy": "zero"}}, "parallelism.strategy"),
        (
            {"workers": 4, "parallelism": {"strategy": "hsdp"}},
            "strategy hsdp needs a shard that divides the 4 workers, not None",
        ),
        (
            {"workers": 4, "parallelism": {"strategy": "hsdp", "shard": 3}},
            "strategy hsdp needs a shard that divides the 4 workers, not 3",
        ),
        (
            {"workers": 4, "parallelism": {"strategy": "fsdp", "shard": 2}},
            "strategy fsdp on 4 workers has shard 4, not 2: leave shard out",
        ),
        ({"parallelism": {"shard": 2}}, "strategy ddp on 1 workers has shard 1, not 2"),
        (
            {"workers": 2, "parallelism": {"strategy": "fsdp"}, "optimizer": "adamw8bit"},
            "optimizer adamw8bit goes with strategy ddp",
        ),
        (
            {"workers": 2, "parallelism": {"strategy": "fsdp"}, "ema_on_cpu": True},
            "ema_on_cpu goes with strategy ddp",
        ),
        ({"optimizer": "lion"}, "optimizer"),
        (
            {"lora": {}, "export_understanding": "reference"},
            "export_understanding goes with stages without lora",
        ),
        ({"text": "caption"}, "stage edit1 cannot train on the text 'caption'"),
        ({"learning_rate": -1}, "learning_rate"),
        ({"data": []}, "data"),
    ],
)
def test_mistakes_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        stage(**changes)
    assert "\n" not in str(caught.value) and "test.yaml" in str(caught.value)


@pytest.mark.parametrize("size", ["tiny", "dim-4.6b"])
@pytest.mark.parametrize("name", ["t2i", "edit1", "edit2"])
def test_the_inputs_of_a_stage_can_be_read_without_the_rest(size: str, name: str) -> None:
    file = CONFIGS / f"{size}-{name}.yaml"
    inputs, whole = load_part(StageInputs, file), load_config(StageConfig, file)
    assert dump_config(inputs).items() <= dump_config(whole).items()
    assert inputs.texts == whole.texts and inputs.columns == whole.columns


def test_no_other_key_of_a_stage_is_taken_for_an_input(tmp_path: Path) -> None:
    file = tmp_path / "stage.yaml"
    inputs = {"precision": "bf16", "buckets": True, "vlm_view": "region"}
    every = {key: None for key in StageConfig.model_fields} | SMALL | inputs
    file.write_text(yaml.safe_dump(every))
    assert dump_config(load_part(StageInputs, file)).items() >= inputs.items()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text_mixx": {}}, r"unknown key 'text_mixx' \(did you mean 'text_mix'\?\)"),
        ({"texts": "blueprint"}, r"unknown key 'texts' \(did you mean 'text'\?\)"),
        ({"init": None}, "key 'init'"),
        ({"text": "caption"}, "stage edit1 cannot train on the text 'caption'"),
    ],
)
def test_mistakes_in_the_inputs_alone_are_named(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    file = tmp_path / "stage.yaml"
    file.write_text(yaml.safe_dump(SMALL | changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_part(StageInputs, file)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)


def test_how_many_workers_hold_a_copy_between_them() -> None:
    def parts(workers: int, **parallelism: object) -> int:
        return ParallelismConfig.model_validate(parallelism).parts(workers)

    assert parts(4) == 1
    assert parts(4, strategy="fsdp") == parts(4, strategy="fsdp", shard=4) == 4
    assert parts(1, strategy="fsdp") == 1
    assert parts(4, strategy="hsdp", shard=2) == 2
    alone = {"parallelism": {"strategy": "fsdp"}, "ema_on_cpu": True, "optimizer": "adamw8bit"}
    assert stage(**alone).workers == 1  # who is alone holds all


def test_the_number_of_workers_may_be_a_range() -> None:
    assert stage(workers=3).worker_range == (3, 3)
    elastic = stage(workers=[1, 4], parallelism={"strategy": "fsdp"})
    assert elastic.worker_range == (1, 4)
    assert stage(**dump_config(elastic)) == elastic
    assert load_config(StageConfig, CONFIGS / "tiny-t2i.yaml", ["workers=[1,2]"]).workers == (1, 2)


def test_learning_rate_schedules() -> None:
    constant = stage(warmup_steps=4)
    assert [learning_rate_at(constant, step, 10) for step in (0, 1, 3, 4, 9)] == [
        0.25,
        0.5,
        1.0,
        1.0,
        1.0,
    ]
    cosine = stage(schedule="cosine", warmup_steps=2)
    rates = [learning_rate_at(cosine, step, 10) for step in range(10)]
    assert rates[2] == 1.0 and rates[6] == pytest.approx(0.5) and 0 < rates[9] < 0.1
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_the_best_checkpoint_goes_by_validation() -> None:
    with pytest.raises(ConfigError, match="goes by validation_exact, and validation is not set"):
        stage(keep_best={})
    with pytest.raises(ConfigError, match=r"keep_best\.metric"):
        stage(keep_best={"metric": "loss"}, validation={"data": ["d"]})
    best = stage(keep_best={}, validation={"data": ["d"]}).keep_best
    assert best is not None and (best.metric, best.higher_is_better) == ("validation_exact", True)
