"""Stages on a real Ray Train: two workers, killed ones, the same weights in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import mlflow
import pytest
import torch
from mlflow import MlflowClient

from dim import model
from dim.config import dump_config, validate_config
from dim.errors import ConfigError, InputError, StorageError
from infra import storage
from infra.capacity import CapacityError
from infra.models import load_initial, on_this_machine
from infra.registry import Registry, located
from infra.tracking import Tracking, TrackingError
from tests.feature_shards import cut_latents, write_features
from tests.training.saved import steps_saved
from training import train
from training.loop import DivergedError
from training.plan import absolute, measure
from training.record import StageRecord, identify, read_record
from training.registry import register
from training.stage import RegistryConfig, StageConfig
from training.train import StageResult, TrainingError

STEPS = 12


@dataclass(frozen=True)
class Settings:
    """What the tests here have in common; ``stage(**changes)`` makes a stage of it."""

    values: dict[str, Any]

    def stage(self, out: str | Path, **changes: Any) -> StageConfig:
        return validate_config(
            StageConfig, self.values | {"out": str(out)} | changes, where="test.yaml"
        )


@pytest.fixture(scope="module")
def settings(
    tiny_model_dir: Path, edit_data: str, held_out_data: str, tracking_uri: str
) -> Settings:
    return Settings(
        {
            "stage": "edit2",
            "init": str(tiny_model_dir),
            "data": [edit_data],
            "text_mix": {"blueprint": 1, "instruction": 2},
            "steps": STEPS,
            "batch_size": 4,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "ema_decay": 0.9,
            "changed_cell_weight": 5.0,
            "workers": 2,
            "log_every": 1,
            "checkpoint_every": 4,
            "max_failures": 0,
            "validation": {"data": [held_out_data], "samples": 3, "steps": 2, "every": 6},
            "tracking": {"uri": tracking_uri, "experiment": "test"},
        }
    )


@pytest.fixture(scope="module")
def out(s3_endpoint: str) -> str:
    """Where the undisturbed run writes: an object store."""
    boto3.client("s3", endpoint_url=s3_endpoint).create_bucket(Bucket="dim-training")
    return "s3://dim-training/undisturbed"


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, settings: Settings, out: str) -> StageResult:
    """Twelve steps on two workers without any trouble."""
    return train.run(settings.stage(out))


def test_what_was_trained_is_registered(
    undisturbed: StageResult,
    settings: Settings,
    out: str,
    tracking_uri: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert undisturbed.registered == "models:/dim/1"
    for alias in ("@edit2", "@champion", "/1"):
        assert located(f"models:/dim{alias}", tracking_uri) == undisturbed.model_dir
    assert train.run(settings.stage(out)).registered == undisturbed.registered
    again = train.run(settings.stage(tmp_path / "on", init="models:/dim@edit2", steps=1, workers=1))
    assert again.registered == "models:/dim/2"
    assert located("models:/dim@edit2", tracking_uri) == again.model_dir
    (found,) = MlflowClient(tracking_uri).get_run(again.mlflow_run_id).inputs.dataset_inputs
    assert json.loads(found.dataset.profile)["records"] > 0
    version = MlflowClient(tracking_uri).get_model_version("dim", "1")
    assert version.tags["stage"] == "edit2" and len(version.tags["data.content"]) == 64
    assert (
        model.load(on_this_machine(undisturbed.model_dir)).config
        == load_initial(out + "/model", edits=True).config
    )


def test_the_data_sets_of_a_run_say_how_they_are_mixed(
    settings: Settings, edit_data: str, held_out_data: str, tracking_uri: str, tmp_path: Path
) -> None:
    data = [{"uri": edit_data, "weight": 2, "cap": 9, "name": "mine"}]
    data.append({"uri": held_out_data, "weight": 1, "name": "other"})
    for mixture in ([edit_data, held_out_data], data):  # the same data, otherwise mixed before
        with Tracking(tracking_uri, "mixed").run("edit2") as run:
            train.log_inputs(run, settings.stage(tmp_path, data=mixture))
    found = MlflowClient(tracking_uri).get_run(run.id).inputs.dataset_inputs
    profiles = [json.loads(one.dataset.profile) for one in found]
    assert sorted(profile["records"] for profile in profiles) == [5, 20]
    told = [{tag.key: tag.value for tag in one.tags} for one in found]
    assert sorted(told, key=lambda tags: tags["name"]) == [
        {"mlflow.data.context": "training", "name": "mine", "weight": "2.0", "cap": "9"},
        {"mlflow.data.context": "training", "name": "other", "weight": "1.0"},
    ]


def finish(stage: StageConfig, made: Path) -> None:
    """Leave in a stage's output what it leaves there, its model being that of ``made``."""
    config = absolute(stage)
    steps, _ = measure(config)
    shutil.copytree(made, Path(config.out) / "model")
    with Tracking(str(config.tracking.uri), "test").run("edit2") as run:
        record = StageRecord(identify(config, steps), {}, run.id, finished=True)
    record.write(config.out)


def test_a_registry_that_refuses_leaves_the_model_and_is_asked_again(
    settings: Settings,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refuse(*_: object) -> None:
        raise TrackingError("MLflow at x cannot register: no registry")

    stage = settings.stage(tmp_path / "out")
    finish(stage, tiny_model_dir)
    with monkeypatch.context() as patch:
        patch.setattr(train, "register", refuse)
        made = train.run(stage)
    assert made.registered == "" and model.load(made.model_dir)
    assert "warning: not registered: MLflow at x cannot register" in capsys.readouterr().err
    assert train.run(stage).registered.startswith("models:/dim/")
    assert train.run(stage).registered == train.run(stage).registered
    off = settings.stage(tmp_path / "off", registry=None)
    finish(off, tiny_model_dir)
    assert train.run(off).registered == ""


@pytest.mark.parametrize(
    ("wanted", "values", "best"),
    [
        (RegistryConfig(), (0.5, 0.25, 0.5), 3),
        (RegistryConfig(champion="validation_loss", higher_is_better=False), (0.5, 0.7, 0.6), 1),
        (RegistryConfig(champion=None), (0.5, 0.7, 0.6), None),
    ],
)
def test_the_champion_is_the_best_by_the_metric_of_the_stage(
    wanted: RegistryConfig,
    values: tuple[float, ...],
    best: int | None,
    tmp_path: Path,
    settings: Settings,
) -> None:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    for number, value in enumerate(values):
        stage = settings.stage(tmp_path / str(number))
        folder = tmp_path / str(number) / "model"
        folder.mkdir(parents=True)
        (folder / "dim.json").write_text(str(number))
        with Tracking(uri, "test").run("edit2") as run:
            metrics = {"validation_exact": value, "validation_loss": value}
            record = StageRecord({"data": "d", "init": "i"}, {}, run.id, True, metrics)
        assert register(stage, record, wanted, uri).version == number + 1
    champion = Registry(uri).find("dim", "champion")
    assert (champion and champion.version) == best


def losses_of(tracking_uri: str, result: StageResult) -> dict[int, float]:
    client = mlflow.MlflowClient(tracking_uri)
    history = client.get_metric_history(result.mlflow_run_id, "loss")
    return {metric.step: metric.value for metric in history}


def weights_of(folder: str | Path) -> dict[str, torch.Tensor]:
    saved = load_initial(str(folder), edits=True)
    return dict(saved.connector.state_dict()) | dict(saved.painter.state_dict())


def assert_close(one: str, other: str, tolerance: float) -> None:
    expected = weights_of(other)
    for name, tensor in weights_of(one).items():
        assert torch.allclose(tensor, expected[name], atol=tolerance), name


def loop_that_is_killed(
    step: int, after: str, out: Path, told: int | None = None
) -> Callable[[dict[str, Any]], Any]:
    """The training loop whose rank 0 dies before ``step``, once, when ``after`` is written.

    Rank 1 gets SIGTERM before the step ``told``, once.
    """
    committed, died = out / "checkpoints" / after / "manifest.json", out / f"died-{step}"

    def train_loop(config: dict[str, Any]) -> Any:
        from training import loop, notices

        update = loop.update

        def fatal(worker: Any, number: int) -> Any:
            if number == step and worker.rank == 0 and not died.exists():
                while not committed.exists():
                    time.sleep(0.05)
                died.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            if number == told and worker.rank == 1 and not (out / "told").exists():
                (out / "told").touch()
                os.kill(os.getpid(), signal.SIGTERM)
                while not notices._Terminated.told:  # the main thread takes note of it
                    time.sleep(0.05)
            return update(worker, number)

        loop.update = fatal
        return loop.train_loop_per_worker(config)

    return train_loop


def test_a_stage_leaves_a_model_metrics_and_a_picture(
    undisturbed: StageResult, settings: Settings, tracking_uri: str, tiny_model_dir: Path
) -> None:
    losses = losses_of(tracking_uri, undisturbed)
    assert list(losses) == list(range(1, STEPS + 1))
    assert sum(losses[step] for step in (10, 11, 12)) < sum(losses[step] for step in (1, 2, 3))
    client = mlflow.MlflowClient(tracking_uri)
    stored = client.get_run(undisturbed.mlflow_run_id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params["learning_rate"] == "0.001"
    assert stored.data.params["validation.samples"] == "3"
    assert {"loss", "learning_rate", "samples_per_second", "grad_norm"} <= set(stored.data.metrics)
    pictures = [file.path for file in client.list_artifacts(stored.info.run_id, "validation")]
    assert pictures == ["validation/step-00000006.png", "validation/step-00000012.png"]
    assert undisturbed.metrics["validation_exact"] >= 0
    assert undisturbed.metrics["progress"] == 1
    begun, trained = weights_of(tiny_model_dir), weights_of(undisturbed.model_dir)
    assert any(not torch.equal(begun[name], trained[name]) for name in begun)


def test_only_the_last_checkpoints_are_kept(undisturbed: StageResult, out: str) -> None:
    assert undisturbed.checkpoint == f"{out}/checkpoints/step-00000012"
    assert steps_saved(out) == [8, 12]
    files = storage.open_store(f"{out}/checkpoints/step-00000012").list(suffix=".bin")
    assert len(files) == 2 and files[0][1] == pytest.approx(files[1][1], rel=0.1)  # a half each


def test_a_finished_stage_is_handed_back_and_not_run_again(
    undisturbed: StageResult, settings: Settings, out: str
) -> None:
    before = time.monotonic()
    assert train.run(settings.stage(out)) == undisturbed
    assert train.run(settings.stage(out, workers=1, log_every=5)) == undisturbed
    assert time.monotonic() - before < 10
    with pytest.raises(ConfigError, match=r"finished run with other settings \(learning_rate\)"):
        train.run(settings.stage(out, learning_rate=2e-3))


@pytest.mark.slow
def test_killed_workers_and_another_number_of_them_change_nothing(
    undisturbed: StageResult,
    settings: Settings,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    killed = loop_that_is_killed(6, "step-00000004", tmp_path)
    monkeypatch.setattr(train, "train_loop_per_worker", killed)
    with pytest.raises(TrainingError, match="stage edit2 failed after 0 restarts"):
        train.run(settings.stage(tmp_path, workers=1))
    killed = loop_that_is_killed(9, "step-00000008", tmp_path, told=10)
    monkeypatch.setattr(train, "train_loop_per_worker", killed)
    said: list[str] = []
    result = train.run(
        settings.stage(tmp_path, max_failures=1),  # SIGTERM is none
        on_progress=lambda lines, metrics: said.extend(lines),
    )
    resumed = [line[len("00:00:00 ") :] for line in said if "resumed" in line]
    assert resumed == [
        "resumed after step 4 of 12 (epoch 0, batch 4 of 5)",
        "resumed after step 8 of 12 (epoch 1, batch 3 of 5)",
        "resumed after step 11 of 12 (epoch 2, batch 1 of 5)",
    ]
    curve, expected = losses_of(tracking_uri, result), losses_of(tracking_uri, undisturbed)
    assert list(curve) == list(expected)
    assert curve == pytest.approx(expected, rel=1e-2)  # other sums of the same numbers
    assert_close(result.model_dir, undisturbed.model_dir, 5e-3)


def loop_that_diverges() -> Callable[[dict[str, Any]], Any]:
    """The training loop in which one worker's gradients from the sixth on are no numbers."""

    def train_loop(config: dict[str, Any]) -> Any:
        from training import loop

        flow_matching = loop.flow_matching

        def poisoned(worker: Any, step: int, number: int) -> torch.Tensor:
            loss = flow_matching(worker, step, number)
            return loss * float("nan") if step >= 5 and worker.rank == 1 else loss

        loop.flow_matching = poisoned
        return loop.train_loop_per_worker(config)

    return train_loop


def test_sharded_workers_that_diverge_go_back_and_on_with_a_lower_learning_rate(
    ray_cluster: None, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"max_skips": 2, "max_returns": 1, "validation": None}
    changes["parallelism"] = {"strategy": "fsdp"}
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_loop_per_worker", loop_that_diverges())
        with pytest.raises(DivergedError, match="up to step 7 .* after going back 1 times"):
            train.run(settings.stage(tmp_path, **changes))
    back = {"step": 7, "back_to": 4, "salt": 1}
    record = read_record(str(tmp_path))
    assert record is not None and record.events == [back]
    result = train.run(settings.stage(tmp_path, **changes, learning_rate=5e-4))
    record = read_record(str(tmp_path))
    assert record is not None and record.finished
    assert record.events == [back, {"step": 4, "learning_rate": 5e-4, "before": 1e-3}]
    assert result.metrics["learning_rate"] == 5e-4 and result.metrics["skipped_updates"] == 0


def test_samples_of_several_shapes_train_with_their_shapes_in_the_output(
    ray_cluster: None,
    settings: Settings,
    edit_data: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    s3: str,
) -> None:
    squares = write_features(edit_data, tmp_path / "squares", tiny_model_dir)
    cells = [*[(8, 8)] * 12, *[(8, 6)] * 7, (6, 8)]
    mixed = cut_latents(squares, f"{s3}/mixed", cells)
    said: list[str] = []
    stage = settings.stage(
        f"{s3}/out", data=[mixed], buckets=True, steps=None, epochs=1, validation=None
    )
    result = train.run(stage, on_progress=lambda lines, metrics: said.extend(lines))
    assert result.metrics["epoch"] == result.metrics["progress"] == 1
    assert any("20 samples, 5 steps an epoch, 5 steps;" in line for line in said)
    assert any("repeated to fill a batch of 4: the samples of 64x48 (1)" in line for line in said)
    assert storage.exists(f"{s3}/out/shapes.parquet")
    with pytest.raises(ConfigError, match=r"a finished run with other settings \(buckets, steps\)"):
        train.run(stage.model_copy(update={"buckets": False, "epochs": 2}))


def test_mistakes_are_found_before_a_worker_starts(
    settings: Settings,
    t2i_data: str,
    edit_data: str,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_trainer(plan: object) -> None:
        raise AssertionError("a trainer was made")

    monkeypatch.setattr(train, "make_trainer", no_trainer)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    nowhere = str(tmp_path / "nowhere")
    features = write_features(
        edit_data, tmp_path / "features", tiny_model_dir, texts=("blueprint",)
    )
    mistakes: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"data": [features]}, InputError, "this stage also trains on 'instruction'"),
        ({"data": [features, edit_data]}, InputError, f"holds features and {edit_data} does not"),
        (
            {"validation": {"data": [features]}},
            InputError,
            f"{features} holds features, and images are needed here",
        ),
        ({"data": [nowhere]}, StorageError, "nowhere does not exist"),
        ({"data": [t2i_data]}, InputError, "lacks the column 'image_target'"),
        ({"init": nowhere}, Exception, "no model folder or model YAML at"),
        (
            {"validation": {"data": [t2i_data]}},
            InputError,
            f"the training data in {t2i_data} lacks",
        ),
        (
            {"tracking": {"uri": "http://127.0.0.1:9"}},
            TrackingError,
            "MLflow at http://127.0.0.1:9 cannot",
        ),
    ]
    for changes, kind, message in mistakes:
        with pytest.raises(kind, match=message) as caught:
            train.run(settings.stage(tmp_path / "out", **changes))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("workers", [2, (2, 3)])
def test_workers_that_no_node_takes_are_not_waited_for(
    ray_cluster: None, settings: Settings, tmp_path: Path, workers: Any
) -> None:
    stage = settings.stage(tmp_path / "out", workers=workers, cpus_per_worker=64, nodes_wait_s=1)
    wanted = "stage edit2 wants 2 workers of {CPU: 64}, and no node has CPU 8 of 64; no autoscaler"
    with pytest.raises(CapacityError, match=wanted):
        train.run(stage)


def test_a_wrong_key_is_one_clear_line(
    settings: Settings, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    import yaml

    from dim.cli import run as run_command

    file = tmp_path / "stage.yaml"
    values = dump_config(settings.stage(tmp_path / "out"))
    file.write_text(yaml.safe_dump({**values, "learning_rat": 1}))
    with pytest.raises(SystemExit) as caught:
        run_command(train.main, [str(file), "workers=1"])
    assert caught.value.code == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line]
    assert lines == [f"error: {file}: unknown key 'learning_rat' (did you mean 'learning_rate'?)"]
