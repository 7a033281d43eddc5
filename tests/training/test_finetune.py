"""Fine-tuning: an adapter is learnt, resumed, written and used, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dim import cli, tabletop
from dim import model as models
from dim.config import dump_config, load_config
from dim.errors import InputError
from dim.images import save_png
from dim.model import ModelConfig
from dim.model.lora import layers
from infra.tracking import Tracking
from tests.conftest import ROOT
from tests.training.power import power_cut
from tests.training.saved import read_saved
from training import loop
from training.loop import train_loop_per_worker
from training.plan import Plan, count_samples
from training.stage import StageConfig
from training.train import run

LORA = {"rank": 4, "train": ["patch_embed", "null_condition"]}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model; its painter has painted from captions and has never seen a source."""
    folder = tmp_path_factory.mktemp("base") / "model"
    models.build(load_config(ModelConfig, ROOT / "configs" / "tiny.yaml")).save(folder)
    return folder


@pytest.fixture
def start(
    base: Path, edit_data: str, tmp_path: Path, tracking_uri: str, alone: Any
) -> Callable[..., tuple[dict[str, Any], str]]:
    """``start(out="name", …)``: run the loop; its answer and the MLflow run's id."""

    def begin(out: str = "out", **settings: Any) -> tuple[dict[str, Any], str]:
        defaults = {
            "stage": "edit2",
            "init": str(base),
            "data": [edit_data],
            "out": str(tmp_path / out),
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 3e-3,
            "log_every": 1,
            "lora": LORA,
        }
        config = StageConfig.model_validate(defaults | settings)
        with Tracking(tracking_uri, "dim-training").run(config.stage) as mlflow_run:
            plan = Plan(
                config=config,
                steps=config.steps or 1,
                rows=count_samples(config),
                tracking_uri=tracking_uri,
                run_id=mlflow_run.id,
            )
            return train_loop_per_worker(dump_config(plan)), mlflow_run.id

    return begin


def adapter_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted((folder / "adapter").iterdir())
        for name, tensor in load_file(file).items()
    }


def dim(*arguments: object) -> int:
    return cli.execute(cli.root(), [str(item) for item in arguments], prog_name="dim")


def test_from_pairs_to_a_changed_picture(
    start: Callable[..., Any], base: Path, edit_data: str, tmp_path: Path
) -> None:
    validation = {"data": [edit_data], "samples": 16, "steps": 1}
    first, _ = start("one", steps=1, validation=validation)
    last, _ = start("many", steps=60, batch_size=8, ema_decay=0.9, validation=validation)
    before, after = (each["metrics"]["validation_loss"] for each in (first, last))
    assert after < 0.8 * before, (before, after)

    made = tmp_path / "many"
    assert not (made / "model").exists()
    sizes = sum(file.stat().st_size for file in (made / "adapter").iterdir())
    assert sizes < 0.2 * sum(f.stat().st_size for f in (base / "painter").iterdir())

    edit = tabletop.sample_edit(np.random.default_rng([5, 0]))
    photo, adapter = tmp_path / "photo.png", made / "adapter"
    save_png(tabletop.render(edit.source, 64), photo)
    common = ("--designer", "none", "--steps", "4", "--seed", "3")

    def edited(name: str, model: Path, *lora: object) -> np.ndarray:
        out = tmp_path / f"{name}.png"
        assert dim("edit", photo, edit.instruction, "-m", model, "-o", out, *common, *lora) == 0
        return np.asarray(Image.open(out))

    plain = edited("plain", base)
    changed = edited("changed", base, "--lora", adapter)
    assert not np.array_equal(plain, changed)
    assert np.array_equal(plain, edited("nothing", base, "--lora", f"{adapter}:0"))
    merged = tmp_path / "merged"
    assert dim("model", "merge", base, "--lora", adapter, "--out", merged) == 0
    assert np.array_equal(changed, edited("merged", merged))


def test_checkpoints_optimizer_and_average_hold_the_adapter_only(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    answer, _ = start(ema_decay=0.5, lora=LORA | {"targets": ["attn2.to_q"]})
    assert answer["error"] is None
    _, saved = read_saved(tmp_path / "out")
    wanted = {
        f"painter.network.transformer_blocks.{block}.attn2.to_q.lora_{half}.default.weight"
        for block in range(5)
        for half in "AB"
    } | {
        "painter.null_condition",
        "painter.network.patch_embed.proj.weight",
        "painter.network.patch_embed.proj.bias",
    }
    moments = {f"optimizer.0.{place}" for place in range(len(wanted))}
    assert saved.keys() == {
        *(f"{part}.{name}" for part in ("module", "ema") for name in wanted),
        *(f"{each}.{name}" for each in moments for name in ("step", "exp_avg", "exp_avg_sq")),
    }
    exported = adapter_of(tmp_path / "out")
    key = "transformer_blocks.0.attn2.to_q.lora_B"
    average, trained = (
        saved[f"{each}.painter.network.{key}.default.weight"] for each in ("ema", "module")
    )
    assert torch.equal(exported[f"transformer.{key}.weight"], average)
    assert not torch.equal(average, trained)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_an_interrupted_run_makes_the_same_adapter(
    dropout: float, start: Callable[..., Any], tmp_path: Path
) -> None:
    settings = {"steps": 6, "checkpoint_every": 2, "ema_decay": 0.9}
    settings["lora"] = LORA | {"dropout": dropout}
    start("through", **settings)
    with power_cut(5):
        start("resumed", **settings)
    assert not (tmp_path / "resumed" / "adapter").exists()
    torch.rand(7)  # what torch's own generator does is no matter
    answer, _ = start("resumed", **settings)
    assert answer["error"] is None
    one, other = adapter_of(tmp_path / "through"), adapter_of(tmp_path / "resumed")
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_dropout_is_on_in_training_and_off_in_validation(
    start: Callable[..., Any], edit_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[tuple[str, bool]] = []
    forward, where = layers.RowDropout.forward, ["training"]
    monkeypatch.setattr(
        layers.RowDropout,
        "forward",
        lambda self, x: (modes.append((where[0], self.training)), forward(self, x))[1],
    )
    validate = loop.validate

    def watched(worker: Any) -> Any:
        where[0] = "validation"
        metrics = validate(worker)
        where[0] = "training"
        return metrics

    monkeypatch.setattr(loop, "validate", watched)
    validation = {"data": [edit_data], "samples": 2, "steps": 1, "every": 1}
    answer, _ = start(steps=2, lora=LORA | {"dropout": 0.5}, validation=validation)
    assert answer["error"] is None
    assert set(modes) == {("training", True), ("validation", False)}


def test_the_frozen_base_is_bfloat16_under_bf16(
    start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: dict[str, torch.dtype] = {}
    prepare = loop.prepare

    def watched(plan: Plan) -> Any:
        worker = prepare(plan)
        for name, each in worker.state.module.named_parameters():
            seen["learns" if each.requires_grad else "frozen"] = each.dtype
            assert (each.dtype == torch.float32) == each.requires_grad, name
        return worker

    monkeypatch.setattr(loop, "prepare", watched)
    answer, _ = start(precision="bf16", gradient_checkpointing=True, ema_decay=0.9, steps=2)
    assert answer["error"] is None
    assert seen == {"learns": torch.float32, "frozen": torch.bfloat16}
    assert {tensor.dtype for tensor in adapter_of(tmp_path / "out").values()} == {torch.float32}
    _, saved = read_saved(tmp_path / "out")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}


def test_the_adapter_is_an_artifact_of_the_run(
    start: Callable[..., Any], tracking_uri: str, tmp_path: Path
) -> None:
    _, run_id = start(steps=1)
    found = mlflow.MlflowClient(tracking_uri).list_artifacts(run_id, "adapter")
    files = {file.name: file.stat().st_size for file in (tmp_path / "out" / "adapter").iterdir()}
    assert {Path(each.path).name: each.file_size for each in found} == files
    assert set(files) == {"pytorch_lora_weights.safetensors", "dim_adapter.safetensors"}


def test_a_wrong_target_is_an_error_before_the_first_step(start: Callable[..., Any]) -> None:
    answer, _ = start(lora={"targets": ["to_z"]})
    assert isinstance(answer["error"], InputError)
    assert "no layer is called to_z; there are" in str(answer["error"])


def test_an_export_that_was_cut_off_leaves_nothing_behind(
    start: Callable[..., Any], tmp_path: Path
) -> None:
    folder = tmp_path / "out" / "adapter"
    folder.mkdir(parents=True)
    for name in ("dim_adapter.safetensors", ".dim_adapter.safetensors.part"):
        (folder / name).write_bytes(b"half of it")
    answer, _ = start(steps=1, lora={"targets": ["attn1.to_q"], "train": ["patch_embed"]})
    assert answer["error"] is None
    assert {file.name for file in folder.iterdir()} == {
        "pytorch_lora_weights.safetensors",
        "dim_adapter.safetensors",
    }
    assert load_file(folder / "dim_adapter.safetensors").keys() == {
        "transformer.patch_embed.proj.weight",
        "transformer.patch_embed.proj.bias",
    }


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_example_configuration_on_two_workers(
    base: Path, edit_data: str, tmp_path: Path, tracking_uri: str
) -> None:
    """Through Ray Train and DDP, as ``dim train configs/finetune.yaml …`` would."""
    overrides = [
        f"init={base}", f"data=[{edit_data}]", "use_gpu=false", "precision=fp32", "steps=3",
        "batch_size=4", "cpus_per_worker=1", "warmup_steps=0", "checkpoint_every=2",
        "lora.dropout=0.2", "lora.train=[patch_embed]", f"tracking.uri={tracking_uri}",
    ]  # fmt: skip
    made = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        config = load_config(
            StageConfig,
            ROOT / "configs" / "finetune.yaml",
            [*overrides, f"out={out}", f"workers={workers}"],
        )
        result = run(config)
        assert result.model_dir == str(out / "adapter")
        assert not (out / "model").exists()
        made.append(adapter_of(out))
    one, two = made
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=2e-5)
