"""The loop on one worker, without a cluster."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from ray.exceptions import RayActorError
from ray.train import PreemptionInfo

from dim import model, records
from dim.config import dump_config
from dim.errors import (
    CheckpointError,
    DimError,
    InputError,
    StorageError,
    StorageUnavailable,
)
from dim.features.shards import ImageShards
from dim.images import encode_jpeg
from dim.learning.step import changed_cells
from dim.model import flow
from dim.model.autoencoder import Autoencoder
from dim.model.conditioner import Conditioner
from dim.model.painter import Painter
from infra import storage
from infra.tracking import Run, Tracking, TrackingError
from tests.datasets import edit_rows, png
from tests.feature_shards import cut_latents, write_features
from tests.image_files import opened
from tests.training.power import power_cut
from tests.training.saved import read_saved, steps_saved
from training import loop, notices
from training.bad_samples import TooManyBadSamples
from training.checkpoint_files import Snapshot
from training.checkpoints import UnsavedError
from training.loop import DivergedError, train_loop_per_worker
from training.metrics import Breakdown
from training.mixture import count_sources
from training.plan import Plan, count_samples
from training.shapes import find_shapes
from training.stage import StageConfig


@pytest.fixture
def start(
    tiny_model_dir: Path, tmp_path: Path, tracking_uri: str, alone: Any
) -> Callable[..., tuple[dict[str, Any], str]]:
    """``start(stage=…, data=[…], …)``: run the loop; its answer and the MLflow run's id."""

    def run(**settings: Any) -> tuple[dict[str, Any], str]:
        defaults = {
            "stage": "edit1",
            "init": str(tiny_model_dir),
            "out": str(tmp_path / "out"),
            "steps": 3,
            "batch_size": 2,
            "learning_rate": 1e-3,
            "log_every": 1,
        }
        config = StageConfig.model_validate(defaults | settings)
        rows, shapes = count_samples(config), find_shapes(config)
        if shapes is not None:
            shapes.write(config.out)
        with Tracking(tracking_uri, "dim-training").run(config.stage) as mlflow_run:
            plan = Plan(
                config=config,
                steps=config.steps or 1,
                rows=rows,
                sources=count_sources(config),
                tracking_uri=tracking_uri,
                run_id=mlflow_run.id,
                shapes=None if shapes is None else shapes.told(),
            )
            return train_loop_per_worker(dump_config(plan)), mlflow_run.id

    return run


def losses_of(tracking_uri: str, run_id: str) -> dict[int, float]:
    history = mlflow.MlflowClient(tracking_uri).get_metric_history(run_id, "loss")
    latest = sorted(history, key=lambda metric: metric.timestamp)  # a step may be made twice
    return {metric.step: metric.value for metric in latest}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    saved = model.load(folder)
    return dict(saved.connector.state_dict()) | dict(saved.painter.state_dict())


def test_text_to_image_trains_and_its_painter_becomes_an_edit_painter(
    start: Callable[..., Any], tiny_model_dir: Path, t2i_data: str, edit_data: str, tmp_path: Path
) -> None:
    first = model.load(tiny_model_dir)
    painter = first.config.painter.model_copy(update={"source_latent": False})
    model.build(first.config.model_copy(update={"painter": painter})).save(tmp_path / "narrow")
    answer, _ = start(
        stage="t2i",
        data=[t2i_data],
        init=str(tmp_path / "narrow"),
        out=str(tmp_path / "t2i"),
        cache_features=False,
    )
    assert answer["error"] is None
    painted = model.load(tmp_path / "t2i" / "model")
    assert not painted.painter.takes_source
    answer, _ = start(
        data=[edit_data], init=str(tmp_path / "t2i" / "model"), out=str(tmp_path / "edit")
    )
    assert answer["error"] is None
    edited = model.load(tmp_path / "edit" / "model")
    kernel = edited.painter.network.patch_embed.proj.weight
    assert kernel.shape[1] == 16 and kernel[:, 8:].abs().max() > 0
    untouched = edited.conditioner.state_dict()
    for name, tensor in first.conditioner.state_dict().items():
        assert torch.equal(tensor, untouched[name]), name


def test_a_stage_writes_down_what_the_understanding_model_saw(
    start: Callable[..., Any], make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    rows = edit_rows(8)
    for row in rows:  # something is cut off
        for name in ("image", "image_target"):
            row[name] = png(opened(row[name]).resize((96, 64)))
    data = make_dataset("wide", rows, records.EDIT)
    losses = {}
    for view in ("region", "whole"):
        answer, _ = start(data=[data], vlm_view=view, out=str(tmp_path / view), steps=1)
        assert answer["error"] is None
        losses[view] = answer["metrics"]["loss"]
        saved = model.load(tmp_path / view / "model")
        assert saved.config.understanding.vlm_view == view
    assert losses["region"] != losses["whole"]


def test_cached_and_live_features_train_alike(
    start: Callable[..., Any], edit_data: str, tracking_uri: str, tmp_path: Path
) -> None:
    _, cached = start(data=[edit_data], out=str(tmp_path / "a"))
    _, live = start(data=[edit_data], out=str(tmp_path / "b"), cache_features=False)
    one, other = losses_of(tracking_uri, cached), losses_of(tracking_uri, live)
    assert list(one) == [1, 2, 3]
    assert one == pytest.approx(other, rel=2e-2)


def test_a_step_has_the_loss_of_flow_matching(
    start: Callable[..., Any], edit_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update, dropped = loop.update, []

    def checked(worker: Any, step: int) -> Any:
        draws, batch = worker.feed.get(step)
        parts = worker.model
        condition = parts.painter.drop_condition(
            parts.connector(batch.hidden_states), draws.dropped
        )
        wanted = flow.loss(
            parts.painter,
            batch.latent,
            draws.noise,
            draws.index,
            condition,
            batch.mask,
            source_latent=batch.source_latent,
            weight=changed_cells(batch.latent, batch.source_latent, 5.0),
            schedule=flow.FlowSchedule(parts.config.sampling.shift),
        )
        loss, norm = update(worker, step)
        assert torch.equal(loss, wanted.mean())
        dropped.extend(draws.dropped.tolist())
        return loss, norm

    monkeypatch.setattr(loop, "update", checked)
    settings = {"condition_dropout": 0.5, "changed_cell_weight": 5.0, "batch_size": 4}
    answer, _ = start(data=[edit_data], **settings)
    assert answer["error"] is None
    assert len(dropped) == 12 and any(dropped) and not all(dropped)


def test_checkpointed_gradients_train_alike(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[bool] = []
    switch = Painter.checkpoint_gradients
    monkeypatch.setattr(
        Painter, "checkpoint_gradients", lambda self, on: (asked.append(on), switch(self, on))[1]
    )
    _, plain = start(data=[edit_data], out=str(tmp_path / "a"))
    _, checkpointed = start(data=[edit_data], out=str(tmp_path / "b"), gradient_checkpointing=True)
    assert asked == [False, True]
    one, other = losses_of(tracking_uri, plain), losses_of(tracking_uri, checkpointed)
    assert one == pytest.approx(other, rel=1e-5)


def test_the_exported_weights_are_the_average(
    start: Callable[..., Any], edit_data: str, tmp_path: Path, tiny_model_dir: Path
) -> None:
    answer, _ = start(data=[edit_data], ema_decay=0.9, out=str(tmp_path / "out"))
    assert answer["error"] is None
    values, saved = read_saved(tmp_path / "out")
    exported, begun = weights_of(tmp_path / "out" / "model"), weights_of(tiny_model_dir)
    name = "network.proj_out.weight"
    average, trained = saved[f"ema.painter.{name}"], saved[f"module.painter.{name}"]
    assert torch.equal(exported[name], average)
    assert not torch.equal(average, trained) and not torch.equal(average, begun[name])
    assert values["step"] == 3


def test_a_run_goes_on_from_its_checkpoint_and_not_from_the_start(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    settings = {"data": [edit_data], "steps": 6, "checkpoint_every": 2, "ema_decay": 0.9}
    _, through = start(**settings, out=str(tmp_path / "through"))

    with power_cut(5):
        start(**settings, out=str(tmp_path / "resumed"))
    answer, resumed = start(**settings, out=str(tmp_path / "resumed"))
    assert answer["error"] is None
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert list(rest) == [5, 6]
    assert rest == {step: whole[step] for step in (5, 6)}
    one, other = (weights_of(tmp_path / name / "model") for name in ("through", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    said = mlflow.MlflowClient(tracking_uri).get_run(resumed).data.tags["said"]
    assert "resumed after step 4 of 6 (epoch 0, batch 4 of 10)" in said and "step 6/6" in said


Poison = Callable[..., None]


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Poison:
    """``poison(when)``: the loss is no number in steps where ``when(step, salt)``."""
    flow_matching = loop.flow_matching

    def apply(when: Callable[[int, int], bool]) -> None:
        def poisoned(worker: Any, step: int, number: int) -> torch.Tensor:
            loss = flow_matching(worker, step, number)
            return loss * float("nan") if when(step, worker.state.salt) else loss

        monkeypatch.setattr(loop, "flow_matching", poisoned)

    return apply


@pytest.mark.parametrize("told_by", ["SIGTERM", "Ray Train"])
def test_a_run_that_is_told_to_end_saves_at_once_and_goes_on_exactly(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    alone: Any,
    told_by: str,
) -> None:
    settings = {"data": [edit_data], "steps": 6, "checkpoint_every": 2, "ema_decay": 0.9}
    _, through = start(**settings, out=str(tmp_path / "through"))
    update, former = loop.update, signal.getsignal(signal.SIGTERM)

    def told(worker: Any, step: int) -> Any:
        if step == 2 and told_by == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
        elif step == 2:
            alone.preemption = PreemptionInfo(None, {"node": [0]})
            worker.notices._asked -= notices._ASK_EVERY_S
        return update(worker, step)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "update", told)
        with pytest.raises(RayActorError) as caught:
            start(**settings, out=str(tmp_path / "resumed"))
    assert caught.value.preempted  # so Ray Train does not count it as a failure
    reason = "told to end (SIGTERM)" if told_by == "SIGTERM" else "1 nodes are about to be taken"
    assert reason in str(caught.value) and str(caught.value).endswith(": ended after step 3")
    assert steps_saved(tmp_path / "resumed") == [2, 3]
    assert signal.getsignal(signal.SIGTERM) is former

    alone.preemption = None
    answer, resumed = start(**settings, out=str(tmp_path / "resumed"))
    assert answer["error"] is None
    assert answer["checkpoint"] == f"{tmp_path}/resumed/checkpoints/step-00000006"
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in (4, 5, 6)}
    one, other = (weights_of(tmp_path / name / "model") for name in ("through", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_that_is_told_to_end_while_no_gradient_is_finite_leaves_what_it_had(
    start: Callable[..., Any],
    edit_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    poison: Poison,
) -> None:
    poison(lambda step, salt: step >= 3)
    update = loop.update

    def told(worker: Any, step: int) -> Any:
        worker.notices.ending = "the end" if step == 4 else ""
        return update(worker, step)

    monkeypatch.setattr(loop, "update", told)
    with pytest.raises(RayActorError, match="the end: ended after step 5"):
        start(data=[edit_data], steps=6, checkpoint_every=2)
    assert steps_saved(tmp_path / "out") == [2]


def test_checkpoints_by_the_clock_and_of_the_best(
    start: Callable[..., Any],
    edit_data: str,
    held_out_data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    update, scores = loop.update, iter([0.5, 0.9, 0.1])

    def an_hour_later(worker: Any, step: int) -> Any:
        if step == 4:
            worker.notices._saved -= 3600
        return update(worker, step)

    def scored(worker: Any) -> dict[str, float]:
        return {"validation_exact": next(scores)}

    monkeypatch.setattr(loop, "update", an_hour_later)
    monkeypatch.setattr(loop, "validate", scored)
    answer, _ = start(
        data=[edit_data],
        steps=8,
        checkpoint_minutes=60,
        keep_checkpoints=2,
        keep_best={},
        validation={"data": [held_out_data], "samples": 1, "steps": 1, "every": 3},
    )
    assert answer["error"] is None and answer["metrics"]["validation_exact"] == 0.1
    # Made after validation at 3 and 6, by the clock at 5, and at the end.
    assert steps_saved(tmp_path / "out") == [6, 8]


def test_checkpoints_that_cannot_be_written_are_returned(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(self: Snapshot, store: storage.Store, name: str) -> Any:
        raise StorageError(f"cannot write {name}: no space left on the disk")

    monkeypatch.setattr(Snapshot, "write", full)
    answer, run_id = start(data=[edit_data], steps=6, checkpoint_every=1)
    assert isinstance(answer["error"], UnsavedError)
    assert str(answer["error"]).endswith("no space left on the disk")
    assert list(losses_of(tracking_uri, run_id)) == [1, 2, 3]  # the second one's failure was seen
    said = mlflow.MlflowClient(tracking_uri).get_run(run_id).data.tags["said"]
    assert said.count("warning: a checkpoint was not written") == 2
    assert not (tmp_path / "out" / "model").exists()


def test_checkpoints_that_cannot_be_used_are_returned(
    start: Callable[..., Any], edit_data: str, tmp_path: Path
) -> None:
    former = tmp_path / "out" / "checkpoints" / "step-00000004"
    former.mkdir(parents=True)
    (former / "state.pt").write_bytes(b"of a former version")
    answer, _ = start(data=[edit_data])
    assert isinstance(answer["error"], CheckpointError)
    assert "saved by a former version of this program (state.pt)" in str(answer["error"])


def test_a_gradient_that_is_no_number_moves_nothing_and_is_counted(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    poison: Poison,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    poison(lambda step, salt: step == 1)
    update, moved = loop.update, []

    def watched(worker: Any, step: int) -> Any:
        state = worker.state
        parts = [*state.module.parameters(), *state.ema.state_dict().values()]
        before = [tensor.detach().clone() for tensor in parts]
        answer = update(worker, step)
        moved.append(not all(map(torch.equal, before, parts)))
        return answer

    monkeypatch.setattr(loop, "update", watched)
    answer, run_id = start(data=[edit_data], ema_decay=0.9)
    assert answer["error"] is None and answer["events"] == []
    assert moved == [True, False, True]
    assert answer["metrics"]["skipped_updates"] == 1
    losses = losses_of(tracking_uri, run_id)
    assert [np.isfinite(losses[step]) for step in (1, 2, 3)] == [True, False, True]


def test_a_run_of_such_gradients_goes_back_and_meets_other_noise(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    poison: Poison,
) -> None:
    settings = {"data": [edit_data], "steps": 8, "checkpoint_every": 2, "max_skips": 2}
    _, undisturbed = start(**settings, out=str(tmp_path / "undisturbed"))
    poison(lambda step, salt: step >= 5 and salt == 0)
    answer, returned = start(**settings, out=str(tmp_path / "returned"))
    assert answer["error"] is None
    # Updates 6 and 7 are skipped; the checkpoint that was due between them was not made.
    assert answer["events"] == [{"step": 7, "back_to": 4, "salt": 1}]
    assert answer["metrics"]["skipped_updates"] == 0  # of the steps that made the weights
    plain, other = losses_of(tracking_uri, undisturbed), losses_of(tracking_uri, returned)
    assert [other[step] == plain[step] for step in range(1, 9)] == [True] * 4 + [False] * 4
    said = mlflow.MlflowClient(tracking_uri).get_run(returned).data.tags["said"]
    assert "2 gradients in a row up to step 7 were no numbers: back to step 4" in said

    # Killed after it went back, it goes on with the same other noise.
    with power_cut(7):
        start(**settings, out=str(tmp_path / "resumed"))
    answer, resumed = start(**settings, out=str(tmp_path / "resumed"))
    assert answer["events"] == [{"step": 7, "back_to": 4, "salt": 1}]
    assert losses_of(tracking_uri, resumed) == {step: other[step] for step in (7, 8)}
    one, two = (weights_of(tmp_path / name / "model") for name in ("returned", "resumed"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_going_back_ends_where_it_does_not_help(
    start: Callable[..., Any], edit_data: str, tmp_path: Path, poison: Poison
) -> None:
    poison(lambda step, salt: step >= 4)
    settings = {"steps": 8, "checkpoint_every": 2, "max_skips": 2, "max_returns": 2}
    answer, _ = start(data=[edit_data], **settings, out=str(tmp_path / "out"))
    assert isinstance(answer["error"], DivergedError)
    assert str(answer["error"]) == (
        "2 gradients in a row up to step 6 were no numbers, after going back 2 times: go on from "
        "the latest checkpoint with a lower learning_rate"
    )
    assert [event["salt"] for event in answer["events"]] == [1, 2]
    assert not (tmp_path / "out" / "model").exists()


def test_a_diverging_run_without_a_checkpoint_stops_with_the_step(
    start: Callable[..., Any], edit_data: str, tmp_path: Path
) -> None:
    settings = {"steps": 8, "learning_rate": 1e30, "max_skips": 3}
    answer, _ = start(data=[edit_data], **settings, out=str(tmp_path / "out"))
    assert isinstance(answer["error"], DivergedError)
    message = str(answer["error"])
    assert "3 gradients in a row up to step 4 were no numbers, before the first" in message
    assert "lower learning_rate" in message
    assert not (tmp_path / "out" / "model").exists()


def test_a_run_may_go_on_with_another_learning_rate(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    poison: Poison,
) -> None:
    settings = {"data": [edit_data], "steps": 6, "checkpoint_every": 2, "max_skips": 2}
    poison(lambda step, salt: step >= 4)
    stopped, _ = start(**settings, max_returns=0)
    assert isinstance(stopped["error"], DivergedError)
    poison(lambda step, salt: False)
    answer, run_id = start(**settings, learning_rate=2e-4)
    change = {"step": 4, "learning_rate": 2e-4, "before": 1e-3}
    assert answer["error"] is None and answer["events"] == [change]
    run = mlflow.MlflowClient(tracking_uri).get_run(run_id)
    assert "learning_rate is 0.0002 from here on, and was 0.001 before" in run.data.tags["said"]
    assert run.data.metrics["learning_rate"] == 2e-4
    values, _ = read_saved(tmp_path / "out")
    assert values["events"] == [change] and values["learning_rate"] == 2e-4


def test_mistakes_are_returned_before_the_first_step(
    start: Callable[..., Any], make_dataset: Callable[..., str], edit_data: str, tmp_path: Path
) -> None:
    def error_of(**settings: Any) -> DimError:
        error = start(**settings)[0]["error"]
        assert isinstance(error, DimError)
        return error

    row = {"id": "bad", "index": 0, "source": "s", "instruction": "x", "image": b"no"}
    broken = make_dataset("broken", [row | {"image_target": b"no"}], records.EDIT)
    assert "the image of sample bad" in str(error_of(data=[broken]))
    assert isinstance(error_of(data=[broken]), InputError)
    missing = error_of(data=[edit_data], init=str(tmp_path / "nothing"))
    assert isinstance(missing, CheckpointError) and "neither a model folder nor" in str(missing)


def test_updates_are_counted(
    start: Callable[..., Any], edit_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = loop.update

    def skipping(worker: Any, step: int) -> Any:
        if step == 1:
            worker.state.step = 2
            return torch.zeros(()), torch.zeros(())
        return update(worker, step)

    monkeypatch.setattr(loop, "update", skipping)
    with pytest.raises(RuntimeError, match=r"3 updates were asked for but \[2\] made"):
        start(data=[edit_data])


def test_metrics_reach_mlflow(start: Callable[..., Any], edit_data: str, tracking_uri: str) -> None:
    _, run_id = start(data=[edit_data], warmup_steps=2)
    client = mlflow.MlflowClient(tracking_uri)
    rates = [metric.value for metric in client.get_metric_history(run_id, "learning_rate")]
    assert np.allclose(rates, [5e-4, 1e-3, 1e-3])
    latest = client.get_run(run_id).data.metrics
    assert latest["progress"] == 1 and latest["features_done"] == 1
    assert latest["grad_norm"] > 0 and latest["samples_per_second"] > 0
    assert latest["epoch"] == pytest.approx(3 / 10)


@pytest.fixture
def features(edit_data: str, tiny_model_dir: Path, tmp_path: Path) -> Callable[..., str]:
    """``features(encoding=…)``: the features of the edits that are trained on here."""
    return lambda **options: write_features(
        edit_data, tmp_path / "features", tiny_model_dir, **options
    )


@pytest.mark.parametrize("cache_features", [True, False])
@pytest.mark.parametrize(("encoding", "tolerance"), [("bf16", 2e-3), ("int8", 1e-2)])
def test_features_from_shards_train_alike_and_the_frozen_parts_rest(
    start: Callable[..., Any],
    edit_data: str,
    features: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_features: bool,
    encoding: str,
    tolerance: float,
) -> None:
    settings = {"stage": "edit2", "text_mix": {"blueprint": 1, "instruction": 1}}
    live = start(data=[edit_data], out=str(tmp_path / "a"), cache_features=False, **settings)[1]
    made = features(encoding=encoding)

    def must_rest(*arguments: object, **options: object) -> None:
        raise AssertionError("a frozen part was used")

    for part, method in ((Conditioner, "see"), (Conditioner, "encode"), (Autoencoder, "encode")):
        monkeypatch.setattr(part, method, must_rest)
    answer, stored = start(
        data=[made], out=str(tmp_path / "b"), cache_features=cache_features, **settings
    )
    assert answer["error"] is None
    one, other = losses_of(tracking_uri, live), losses_of(tracking_uri, stored)
    assert list(one) == [1, 2, 3]
    assert other == pytest.approx(one, rel=tolerance)
    assert other != one  # or the live features were read
    said = mlflow.MlflowClient(tracking_uri).get_run(stored).data.tags["said"]
    how = "held in memory" if cache_features else "read from their shards as needed"
    assert f"features were made before ({encoding}) and are {how}" in said


def test_a_run_on_features_goes_on_from_its_checkpoint(
    start: Callable[..., Any],
    features: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    settings = {"data": [features()], "steps": 6, "checkpoint_every": 2, "cache_features": False}
    _, through = start(**settings, out=str(tmp_path / "through"))
    with power_cut(5):
        start(**settings, out=str(tmp_path / "resumed"))
    _, resumed = start(**settings, out=str(tmp_path / "resumed"))
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in (5, 6)}


def test_stale_features_are_returned_as_an_error(
    start: Callable[..., Any], features: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    other = model.load(tiny_model_dir)
    other.conditioner.model.model.language_model.norm.weight.data += 1
    other.save(tmp_path / "other")
    answer, _ = start(data=[features()], init=str(tmp_path / "other"))
    assert isinstance(answer["error"], InputError)
    assert "are stale" in str(answer["error"]) and "understanding model" in str(answer["error"])


def flawed_rows() -> list[dict[str, Any]]:
    """Edits of which one has no image, one a JPEG that is cut short and one no instruction."""
    rows = edit_rows(20)
    rows[2]["image"] = b"\xff\xd8\xff\xe0 no picture"
    rows[11]["image_target"] = encode_jpeg(opened(rows[11]["image_target"]))[:-200]
    rows[17]["instruction"] = None
    return rows


@pytest.mark.parametrize("cache_features", [True, False])
def test_a_run_goes_on_exactly_after_samples_were_replaced(
    start: Callable[..., Any],
    make_dataset: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
    cache_features: bool,
) -> None:
    settings = {
        "data": [make_dataset("flawed", flawed_rows(), records.EDIT)],
        "steps": 12,
        "checkpoint_every": 4,
        "ema_decay": 0.9,
        "bad_samples": 0.5,
        "cache_features": cache_features,
    }
    answer, through = start(**settings, out=str(tmp_path / "through"))
    assert answer["error"] is None
    assert answer["metrics"]["bad_samples"] >= 3  # an epoch has ten steps
    assert answer["metrics"]["bad_samples_undecodable"] >= 2
    assert answer["metrics"]["bad_samples_missing_value"] >= 1
    with power_cut(10):
        start(**settings, out=str(tmp_path / "resumed"))
    _, resumed = start(**settings, out=str(tmp_path / "resumed"))
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in range(9, 13)}
    one, other = (weights_of(tmp_path / name / "model") for name in ("through", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    stored = mlflow.MlflowClient(tracking_uri).get_run(through)
    assert stored.data.metrics["bad_samples"] == answer["metrics"]["bad_samples"]
    assert "samples could not be used and were replaced (" in stored.data.tags["said"]


def test_the_samples_of_a_window_train_and_go_on_exactly(
    start: Callable[..., Any],
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    settings = {"data": [edit_data], "steps": 6, "checkpoint_every": 2, "cache_features": False}
    mixed = start(**settings, out=str(tmp_path / "all"))[1]
    through = start(**settings, shuffle_window=3, out=str(tmp_path / "window"))[1]
    whole = losses_of(tracking_uri, through)
    assert whole != losses_of(tracking_uri, mixed)
    with power_cut(5):
        start(**settings, shuffle_window=3, out=str(tmp_path / "resumed"))
    resumed = start(**settings, shuffle_window=3, out=str(tmp_path / "resumed"))[1]
    assert losses_of(tracking_uri, resumed) == {step: whole[step] for step in (5, 6)}


def test_losses_are_logged_by_source_and_noise_level_where_there_were_any(
    start: Callable[..., Any],
    edit_data: str,
    make_dataset: Callable[..., str],
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = make_dataset("other", edit_rows(4, seed=9), records.EDIT)
    taken: list[tuple[float, int, int]] = []
    add = Breakdown.add

    def noted(self: Any, losses: Any, counted: Any, index: Any, source: Any) -> None:
        taken.extend(zip(losses.tolist(), index.tolist(), source.tolist(), strict=True))
        add(self, losses, counted, index, source)

    monkeypatch.setattr(Breakdown, "add", noted)
    data = [{"uri": edit_data, "name": "many"}, {"uri": other, "name": "few"}]
    answer, run_id = start(data=data, steps=6, batch_size=1, seed=2)
    assert answer["error"] is None and len(taken) == 6
    client = mlflow.MlflowClient(tracking_uri)
    names = ["many", "few", "sigma_q1", "sigma_q2", "sigma_q3", "sigma_q4"]
    logged: dict[int, dict[str, float]] = {}
    for name in names:
        for point in client.get_metric_history(run_id, f"loss/{name}"):
            logged.setdefault(point.step, {})[name] = point.value
    for step, (loss, index, source) in enumerate(taken, 1):
        quartile = names[2 + int(flow.quartile_of(torch.tensor([index])))]
        # A batch of one sample: what it is no part of has no value, not even an old one.
        assert logged[step] == pytest.approx({names[source]: loss, quartile: loss})
    assert {source for _, _, source in taken} == {0, 1}


class Fickle:
    """A judge that has a score at first, and later none."""

    columns = ()
    left = 2  # the trial before training, and the first validation

    def judge(self, *_: Any) -> dict[str, float]:
        Fickle.left -= 1
        return {"mood": 1.0} if Fickle.left >= 0 else {}


def make_fickle() -> Fickle:
    return Fickle()


def test_a_score_that_is_missing_is_not_the_one_of_before(
    start: Callable[..., Any], edit_data: str, held_out_data: str, tracking_uri: str
) -> None:
    validation = {"data": [held_out_data], "samples": 1, "steps": 1, "every": 1}
    validation["judge"] = f"{__name__}:make_fickle"
    answer, run_id = start(data=[edit_data], steps=3, validation=validation)
    assert answer["error"] is None
    assert "validation_loss" in answer["metrics"] and "validation_mood" not in answer["metrics"]
    points = mlflow.MlflowClient(tracking_uri).get_metric_history(run_id, "validation_mood")
    assert {point.step for point in points} == {1, 2}  # 2: the line between two validations


@pytest.mark.parametrize("cache_features", [True, False])
def test_mixed_sources_train_and_go_on_exactly(
    start: Callable[..., Any],
    edit_data: str,
    make_dataset: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_features: bool,
) -> None:
    other = make_dataset("other", edit_rows(7, seed=9), records.EDIT)
    settings = {
        "data": [{"uri": edit_data, "weight": 1, "cap": 12}, {"uri": other, "weight": 3}],
        "steps": 6,
        "batch_size": 4,
        "checkpoint_every": 2,
        "cache_features": cache_features,
        "shuffle_window": None if cache_features else 3,
    }
    held: list[int] = []
    make = loop.make_feed

    def noted(config: Any, order: Any, features: Any, *more: Any) -> Any:
        if cache_features:
            held.append(features._rows)
        return make(config, order, features, *more)

    monkeypatch.setattr(loop, "make_feed", noted)
    _, through = start(**settings, out=str(tmp_path / "through"))
    assert held in ([], [12 + 7])  # each once, though most come several times in an epoch
    with power_cut(5):
        start(**settings, out=str(tmp_path / "resumed"))
    _, resumed = start(**settings, out=str(tmp_path / "resumed"))
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in (5, 6)}
    said = mlflow.MlflowClient(tracking_uri).get_run(resumed).data.tags["said"]
    assert "(12 of 20 samples, " in said and "75.0% other (7 samples, " in said


def test_a_run_on_several_shapes_goes_on_exactly_in_the_middle_of_an_epoch(
    start: Callable[..., Any],
    features: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cells = [*[(8, 8)] * 11, *[(8, 6)] * 6, *[(6, 8)] * 3]  # an epoch of 5 + 3 + 1 steps
    mixed = cut_latents(features(), tmp_path / "mixed", cells)
    settings = {
        "stage": "edit2",
        "data": [mixed],
        "buckets": True,
        "steps": 12,
        "checkpoint_every": 5,
        "ema_decay": 0.9,
        "cache_features": False,
    }
    seen: list[tuple[int, ...]] = []
    flow_matching = loop.flow_matching

    def watched(worker: Any, step: int, number: int) -> Any:
        seen.append(tuple(worker.feed.get(step, number)[1].latent.shape))
        return flow_matching(worker, step, number)

    monkeypatch.setattr(loop, "flow_matching", watched)
    answer, through = start(**settings, out=str(tmp_path / "through"))
    assert answer["error"] is None
    assert answer["metrics"]["epoch"] == pytest.approx(12 / 9)
    first = [seen[:9].count((2, 8, *shape)) for shape in ((8, 8), (8, 6), (6, 8))]
    assert first == [5, 3, 1]
    said = mlflow.MlflowClient(tracking_uri).get_run(through).data.tags["said"]
    assert "each batch is of one of 3 shapes, 64x64 the most frequent with 11 samples" in said
    with power_cut(7):
        start(**settings, out=str(tmp_path / "resumed"))
    _, resumed = start(**settings, out=str(tmp_path / "resumed"))
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in range(6, 13)}
    one, other = (weights_of(tmp_path / name / "model") for name in ("through", "resumed"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("cache_features", [True, False])
def test_weighted_sources_of_several_shapes_go_on_exactly(
    start: Callable[..., Any],
    features: Callable[..., str],
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cache_features: bool,
) -> None:
    made = features()
    cells = [[*[(8, 8)] * 12, *[(8, 6)] * 8], [*[(8, 8)] * 5, *[(8, 6)] * 15]]
    one, two = (cut_latents(made, tmp_path / str(n), some) for n, some in enumerate(cells))
    settings = {
        "stage": "edit2",
        "data": [{"uri": one, "weight": 2, "name": "one"}, {"uri": two, "weight": 1}],
        "buckets": True,
        "steps": 6,
        "batch_size": 6,
        "checkpoint_every": 2,
        "cache_features": cache_features,
    }
    sources: list[list[int]] = []
    flow_matching = loop.flow_matching

    def watched(worker: Any, step: int, number: int) -> Any:
        loss = flow_matching(worker, step, number)
        sources.append(worker.feed.sources(number).tolist())
        return loss

    monkeypatch.setattr(loop, "flow_matching", watched)
    answer, through = start(**settings, out=str(tmp_path / "through"))
    assert answer["error"] is None
    assert all({0, 1} == set(step) for step in sources)  # both in every batch of a shape
    said = mlflow.MlflowClient(tracking_uri).get_run(through).data.tags["said"]
    assert "an epoch has 66.7% one (20 samples, " in said
    assert "in batches of one shape it has 67.1% one, 32.9% 1" in said
    with power_cut(5):
        start(**settings, out=str(tmp_path / "resumed"))
    _, resumed = start(**settings, out=str(tmp_path / "resumed"))
    whole, rest = losses_of(tracking_uri, through), losses_of(tracking_uri, resumed)
    assert rest == {step: whole[step] for step in (5, 6)}


def test_too_many_bad_samples_are_returned_and_not_tried_again(
    start: Callable[..., Any], make_dataset: Callable[..., str], tmp_path: Path
) -> None:
    data = [make_dataset("flawed", flawed_rows(), records.EDIT)]
    answer, _ = start(data=data, steps=12, cache_features=False, out=str(tmp_path / "out"))
    assert isinstance(answer["error"], TooManyBadSamples)
    assert "more than bad_samples: 0.01 allows, such as: " in str(answer["error"])
    assert not (tmp_path / "out" / "model").exists()


def test_a_store_that_goes_away_is_left_to_ray_train(
    start: Callable[..., Any], edit_data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch, away_from = ImageShards.fetch, [5]

    def away(self: ImageShards, rows: np.ndarray, *more: Any) -> Any:
        away_from[0] -= 1
        if away_from[0] < 0:
            raise StorageUnavailable("cannot read s3://b/x: the store cannot be reached")
        return fetch(self, rows, *more)

    monkeypatch.setattr(ImageShards, "fetch", away)
    with pytest.raises(StorageUnavailable, match="the store cannot be reached"):
        start(data=[edit_data], steps=12, cache_features=False)
    away_from[0] = 0  # before the first step
    with pytest.raises(StorageUnavailable, match="the store cannot be reached"):
        start(data=[edit_data], steps=12, cache_features=False)


def test_a_tracker_that_stays_away_is_no_reason_to_train_again(
    start: Callable[..., Any], edit_data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*arguments: Any) -> None:
        raise TrackingError("MLflow at there cannot log")

    monkeypatch.setattr(Run, "log_metric_rows", away)
    answer, _ = start(data=[edit_data])
    assert isinstance(answer["error"], TrackingError)
    assert (tmp_path / "out" / "model" / "dim.json").exists()
