"""What ``--plan`` says, against the published numbers and against a pass that is really made."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dim import model as models
from dim.cli import command_of
from dim.config import load_config
from dim.errors import ConfigError, InputError
from dim.gpus import GPUS, find_gpu, named_gpu
from dim.learning.step import Trainable
from dim.model.config import ModelConfig
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings
from tests.feature_shards import cut_latents, write_features
from training import estimate, train
from training.estimate import _keeping, count_pass
from training.stage import StageConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PUBLISHED = load_config(ModelConfig, CONFIGS / "dim-4.6b.yaml")


def of(name: str, *overrides: str, features: bool = False, steps: int = 1000) -> estimate.Estimate:
    config = load_config(StageConfig, CONFIGS / f"dim-4.6b-{name}.yaml", overrides)
    return estimate.estimate(config, PUBLISHED, steps, features=features)


def test_a_published_stage_takes_what_the_paper_s_numbers_say() -> None:
    made = of("edit2")
    assert made.parameters == pytest.approx(1.6336e9, rel=1e-3) and made.tokens == 1369 + 430
    assert (made.passes, made.rows, made.workers) == (1, 4, 8)
    assert made.trained_flops / 32 == pytest.approx(1.0e13, rel=0.2)
    assert made.frozen_flops / 32 == pytest.approx(2.0e13, rel=0.1)
    assert 60e9 < made.needed < 80e9 and made.memory["averages"] == 0
    assert made.checkpoint == made.parameters * 12


def test_settings_change_what_they_are_for() -> None:
    plain = of("edit2")
    checkpointed = of("edit2", "gradient_checkpointing=true")
    kept = "kept for the backward pass"
    assert checkpointed.memory[kept] < plain.memory[kept] / 10
    assert checkpointed.trained_flops == pytest.approx(plain.trained_flops * 4 / 3)
    sharded = of("edit2", "parallelism={strategy: fsdp}")
    assert sharded.memory["optimizer"] == plain.memory["optimizer"] / 8
    small = of("edit2", "micro_batch=1")
    assert small.passes == 4 and small.memory[kept] < plain.memory[kept] / 3
    assert small.trained_flops == pytest.approx(plain.trained_flops)
    averaged = of("edit2", "ema_decay=0.999")
    assert averaged.memory["averages"] == 4 * plain.parameters
    assert of("edit2", "ema_decay=0.999", "ema_on_cpu=true").memory["averages"] == 0
    assert of("edit2", features=True).frozen_flops == 0
    assert of("t2i").tokens == 700


def test_an_adapter_fits_a_card_of_24_gigabytes() -> None:
    config = load_config(StageConfig, CONFIGS / "finetune.yaml")
    made = estimate.estimate(config, PUBLISHED, 1500, features=True)
    assert made.parameters == pytest.approx(11.6e6, rel=0.01)
    # Frozen weights in bfloat16; of what learns weights, gradients, two moments and an average.
    assert made.memory["weights"] == 2 * 1_633_619_616 + 4 * made.parameters
    assert made.memory["optimizer"] == 8 * made.parameters
    assert made.needed < 5e9 and made.checkpoint == 16 * made.parameters
    whole = of("edit2", "gradient_checkpointing=true", "batch_size=32", features=True)
    # Next to no weight has a gradient: three passes of work and not four.
    assert made.trained_flops / 4 == pytest.approx(0.75 * whole.trained_flops / 32, rel=0.02)


def test_a_step_s_samples_add_up_to_its_work() -> None:
    config = load_config(StageConfig, CONFIGS / "dim-4.6b-edit2.yaml")
    made = of("edit2")
    live = estimate.sample_flops(config, PUBLISHED, made.tokens, live=True)
    assert live * 32 == pytest.approx(made.trained_flops + made.frozen_flops)
    cached = estimate.sample_flops(config, PUBLISHED, made.tokens, live=False)
    assert cached * 32 == pytest.approx(made.trained_flops)
    spared = config.model_copy(update={"gradient_checkpointing": True})
    assert estimate.sample_flops(spared, PUBLISHED, made.tokens, live=False) == cached


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA RTX A1000", None),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(device: str, name: str | None) -> None:
    assert named_gpu(device) == (None if name is None else GPUS[name])


def test_time_follows_from_the_work_and_the_gpus() -> None:
    made = of("edit2", steps=100)
    h100, a100 = find_gpu("H100"), find_gpu("a100")
    assert made.hours(a100) == pytest.approx(made.hours(h100) * 989 / 312)
    seconds = (made.trained_flops + made.frozen_flops) * 100 / (8 * 989e12 * 0.5)
    assert made.hours(h100, 0.5) == pytest.approx(seconds / 3600)
    with pytest.raises(InputError, match="unknown GPU 'h900'; there are rtx4090, a100"):
        find_gpu("h900")


@pytest.mark.parametrize("lora", [None, LoraSettings(rank=4)])
def test_what_is_kept_for_the_backward_pass_is_what_a_real_one_keeps(
    lora: LoraSettings | None, tiny_model_dir: Path
) -> None:
    tiny = models.load(tiny_model_dir)
    tiny.painter.requires_grad_(True)
    tiny.connector.requires_grad_(True)
    if lora is not None:
        layers.insert(tiny, lora, seed=0)
    module = Trainable(tiny).train()
    hidden = tiny.connector.in_features
    channels = tiny.config.painter.architecture["in_channels"]
    kept: dict[int, torch.Tensor] = {}
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    latent = torch.zeros(3, channels, 8, 8)
    with _keeping(kept, weights):
        module(
            latent,
            torch.zeros(3, dtype=torch.float64),
            torch.zeros(3, 40, hidden),
            torch.ones(3, 40, dtype=torch.bool),
            latent,
            torch.zeros(3, dtype=torch.bool),
        )
    real = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    counted = count_pass(
        tiny.config, hidden, 3, 40, 8, edits=True, checkpointed=False, bf16=False, lora=lora
    )
    assert counted.parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert counted.parameters + counted.frozen == sum(p.numel() for p in module.parameters())
    assert counted.kept == pytest.approx(real, rel=0.02)


def test_a_model_whose_sizes_are_not_said_cannot_be_reckoned_with() -> None:
    with pytest.raises(ConfigError, match="no painter.architecture"):
        count_pass(ModelConfig(), 8, 1, 8, 8, edits=True, checkpointed=False, bf16=False)


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """``plan(argument, …)``: what ``dim train`` prints."""
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> str:
        command_of(train.main).main(args=list(arguments), standalone_mode=False)
        return " ".join(capsys.readouterr().out.split())

    return run


def test_the_command_says_it_before_anything_starts(
    plan: Callable[..., str], tmp_path: Path
) -> None:
    said = plan(
        str(CONFIGS / "dim-4.6b-edit2.yaml"), f"out={tmp_path}/out", "workers=[8,16]", "--plan",
        "--model", str(CONFIGS / "dim-4.6b.yaml"), "--samples", "233000", "--gpu", "h100",
        "--price", "2.5",
    )  # fmt: skip
    assert "1,633,619,616" in said and "364,050 of 32 samples" in said
    assert "memory of each of 8 GPUs" in said and "fits into 80.0 GB" in said
    of_the_fewest = float(re.search(r"of its peak │ ([\d.]+)", said)[1])  # type: ignore[index]
    assert f"│ on 16 GPUs │ {of_the_fewest / 2:.1f} │" in said
    assert "hours at 35% of its peak" in said and "at $2.5 a GPU and hour" in said
    assert not (tmp_path / "out").exists()


def test_a_plan_of_what_is_here_needs_nothing_more(
    plan: Callable[..., str], tiny_model_dir: Path, edit_data: str, tmp_path: Path
) -> None:
    said = plan(
        str(CONFIGS / "tiny-edit2.yaml"), f"init={tiny_model_dir}", f"data=[{edit_data}]",
        f"out={tmp_path}/out", "validation=null", "--plan",
    )  # fmt: skip
    assert "2,000 of 48 samples" in said and "memory of each of 2" in said
    assert "hours" not in said and not (tmp_path / "out").exists()


def test_a_plan_says_what_is_mixed(
    plan: Callable[..., str], tiny_model_dir: Path, edit_data: str, held_out_data: str
) -> None:
    data = f"data=[{{uri: {edit_data}, weight: 1, name: one}}, {{uri: {held_out_data}, weight: 1}}]"
    stage = (
        str(CONFIGS / "tiny-edit2.yaml"), f"init={tiny_model_dir}", data, "validation=null",
        "batch_size=24",
    )  # fmt: skip
    said = plan(*stage, "steps=null", "epochs=3", "--plan")
    assert "an epoch │ 50.0% one (20 samples, 3 times each), 50.0% " in said
    assert "15 of 24 samples" in said
    with pytest.raises(InputError, match="--samples says nothing about each of the sources"):
        plan(*stage, "steps=null", "epochs=3", "--plan", "--samples", "1000")
    assert "7 of 24 samples" in plan(*stage, "steps=7", "--plan", "--samples", "1000")


@pytest.fixture(scope="module")
def mixed(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features of 11, 7 and 2 samples of three shapes."""
    folder = tmp_path_factory.mktemp("mixed")
    squares = write_features(edit_data, folder / "squares", tiny_model_dir)
    cells = [*[(8, 8)] * 11, *[(8, 6)] * 7, *[(6, 8)] * 2]
    return cut_latents(squares, folder / "features", cells)


def test_a_plan_with_buckets_counts_the_steps_of_each_shape(
    mixed: str, plan: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    settings = [
        str(CONFIGS / "tiny-edit2.yaml"), f"init={tiny_model_dir}", f"data=[{mixed}]",
        f"out={tmp_path}/out", "validation=null", "steps=null", "epochs=100", "batch_size=4",
        "workers=1", "--plan",
    ]  # fmt: skip
    assert "500 of 4 samples" in plan(*settings)
    assert "400 of 4 samples" in plan(*settings, "buckets=true")  # an epoch has 2 + 1 + 1
    sources = f"data=[{{uri: {mixed}, name: one, repeats: 2}}, {{uri: {mixed}, name: two}}]"
    said = plan(*settings, sources, "buckets=true")
    assert "1,400 of 4 samples" in said  # 8 + 5 + 1
    assert "in batches of one shape it has 66.7% one, 33.3% two" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--gpu", "h100"], "--gpu goes with --plan"),
        (["--plan", "--price", "2"], "--price needs --gpu"),
        (
            ["--plan", "--fresh"],
            "--plan starts nothing, so there is nothing for --fresh",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    plan: Callable[..., str], options: list[str], complaint: str
) -> None:
    with pytest.raises(InputError, match=complaint):
        plan(str(CONFIGS / "tiny-edit2.yaml"), *options)
