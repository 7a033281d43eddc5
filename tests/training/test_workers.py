"""The same stage on other numbers of workers and in other pieces: the same numbers."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from dim import model, records
from dim.errors import InputError
from infra import storage
from infra.storage import Store
from tests.datasets import edit_rows
from tests.feature_shards import cut_latents, write_features
from tests.training.saved import steps_saved
from tests.training.workers import train_together
from training import loop
from training.bad_samples import TooManyBadSamples
from training.checkpoint_files import Snapshot
from training.stage import StageConfig

MakeStage = Callable[..., StageConfig]

# (h, w) of latents: 12 squares, 5 of another shape and 3 that have to repeat in a batch of 5
CELLS = [*[(8, 8)] * 12, *[(8, 6)] * 5, *[(6, 8)] * 3]


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Features that do not depend on which samples are encoded together."""
    return write_features(edit_data, tmp_path_factory.mktemp("features"), tiny_model_dir)


@pytest.fixture
def make_stage(features: str, tiny_model_dir: Path, tmp_path: Path) -> MakeStage:
    """``make_stage("name", key=value, …)``: a stage that writes to a folder of that name."""

    def make(name: str, **settings: Any) -> StageConfig:
        values = {
            "stage": "edit2",
            "text_mix": {"blueprint": 1, "instruction": 1},
            "init": str(tiny_model_dir),
            "data": [features],
            "out": str(tmp_path / name),
            "steps": 4,
            "batch_size": 5,
            "learning_rate": 1e-3,
            "condition_dropout": 0.4,
            "changed_cell_weight": 5.0,
            "log_every": 1,
        }
        return StageConfig.model_validate(values | settings)

    return make


def losses_of(history: dict[int, dict[str, float]]) -> list[float]:
    return [metrics["loss"] for _, metrics in sorted(history.items()) if "loss" in metrics]


def test_any_number_of_workers_and_any_micro_batch_have_equal_losses(
    make_stage: MakeStage, features: str, tracking_uri: str, tmp_path: Path
) -> None:
    # 5 slots: 5; 2 + 2 + 1; 3 + 2; 2 + 1 and 2; 1 + 1 and 1 and nothing new
    ways = [(1, None), (1, 2), (2, None), (2, 2), (3, 1)]
    stages = [
        make_stage(f"{workers}-{micro_batch}", workers=workers, micro_batch=micro_batch)
        for workers, micro_batch in ways
    ]
    mixed = cut_latents(features, tmp_path / "mixed", CELLS)
    shaped = [(1, None, {}), (2, 2, {}), (2, 1, {"parallelism": {"strategy": "fsdp"}})]
    stages += [
        make_stage(
            f"shapes-{number}",
            workers=workers,
            micro_batch=micro_batch,
            data=[mixed],
            buckets=True,
            **others,
        )
        for number, (workers, micro_batch, others) in enumerate(shaped)
    ]
    runs = train_together(stages, tracking_uri, tmp_path / "processes")
    assert all(answer["error"] is None for answer, _ in runs)
    for alike in (runs[: len(ways)], runs[len(ways) :]):
        for _, history in alike[1:]:  # of all workers' samples, repetitions left out
            for step in range(1, 5):
                parts, expected = (
                    {name: value for name, value in each[step].items() if name.startswith("loss/")}
                    for each in (history, alike[0][1])
                )
                assert parts == pytest.approx(expected, abs=1e-4) and parts
        first, *others = (losses_of(history) for _, history in alike)
        assert len(first) == 4 and len(set(first)) == 4  # of 4 shapes' steps in an epoch
        for losses in others:
            assert losses == pytest.approx(first, abs=1e-5)
        norms = [
            [metrics["grad_norm"] for metrics in history.values() if "grad_norm" in metrics]
            for _, history in alike
        ]
        for other in norms[1:]:
            assert other == pytest.approx(norms[0], rel=1e-3)
        assert [history[4]["epoch"] for _, history in alike] == [1.0] * len(alike)


@pytest.mark.slow
def test_sharded_weights_train_as_whole_ones_do(
    make_stage: MakeStage,
    held_out_data: str,
    tiny_model_dir: Path,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    settings = {
        "steps": 20,
        "micro_batch": 2,
        "ema_decay": 0.9,
        "warmup_steps": 2,
        "checkpoint_every": 8,
        # of 3 samples, one at a time, the workers have unequal numbers of passes
        "validation": {
            "data": [held_out_data],
            "samples": 3,
            "steps": 2,
            "every": 6,
            "batch_size": 1,
        },
    }
    fsdp, hsdp = {"strategy": "fsdp"}, {"strategy": "hsdp", "shard": 2}
    stages = [
        make_stage("alone", **settings),
        make_stage("ddp", **settings, workers=2),
        make_stage("fsdp", **settings, workers=2, parallelism=fsdp),
        make_stage(
            "hsdp",
            **settings | {"micro_batch": 1},
            workers=4,
            parallelism=hsdp,
            gradient_checkpointing=True,
        ),
    ]
    runs = train_together(stages, tracking_uri, tmp_path / "processes")
    assert all(answer["error"] is None for answer, _ in runs)
    alone, *others = (history for _, history in runs)
    names = ("loss", "grad_norm", "validation_loss", "validation_distance")
    assert all({*names} <= alone[step].keys() for step in (6, 12, 18, 20))
    for other in others:
        for name in names:
            one, two = (
                [metrics[name] for _, metrics in sorted(history.items()) if name in metrics]
                for history in (alone, other)
            )
            assert len(one) == len(two) and two == pytest.approx(one, rel=1e-4, abs=1e-4), name
    expected = weights_of(tmp_path / "alone")
    assert apart(weights_of(tiny_model_dir.parent), expected) > 1e-2
    for name in ("ddp", "fsdp", "hsdp"):
        assert apart(weights_of(tmp_path / name), expected) < 1e-4, name


def test_checkpoints_load_whoever_saved_them(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"steps": 6, "checkpoint_every": 3, "ema_decay": 0.9, "optimizer": "muon"}
    sharded = {"workers": 2, "parallelism": {"strategy": "fsdp"}}
    ways = {"whole": settings, "sharded": settings | sharded}
    stages = [make_stage(name, **way) for name, way in ways.items()]
    runs = train_together(stages, tracking_uri, tmp_path / "first")
    assert all(answer["error"] is None for answer, _ in runs)
    whole, parts = (losses_of(history) for _, history in runs)
    assert parts == pytest.approx(whole, rel=1e-3)  # Muon computes in bfloat16

    half = "checkpoints/step-00000003"
    shutil.copytree(tmp_path / "sharded" / half, tmp_path / "whole again" / half)
    shutil.copytree(tmp_path / "whole" / half, tmp_path / "sharded again" / half)
    stages = [make_stage(f"{name} again", **way) for name, way in ways.items()]
    runs = train_together(stages, tracking_uri, tmp_path / "second")
    assert all(answer["error"] is None for answer, _ in runs)
    for _, history in runs:
        assert losses_of(history) == pytest.approx(whole[3:], rel=1e-3)
    expected = weights_of(tmp_path / "whole")
    for name in ("sharded", "whole again", "sharded again"):
        assert apart(weights_of(tmp_path / name), expected) < 1e-3, name


def weights_of(out: Path) -> torch.Tensor:
    saved = model.load(out / "model")
    parts = (*saved.connector.parameters(), *saved.painter.parameters())
    return torch.cat([part.detach().flatten() for part in parts])


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


def spoil_the_second_worker(rank: int) -> None:
    """Its loss is no number in steps 5 and 6, until the run has gone back."""
    flow_matching = loop.flow_matching

    def spoiled(worker: Any, step: int, number: int) -> torch.Tensor:
        loss = flow_matching(worker, step, number)
        bad = rank == 1 and step in (4, 5) and not worker.state.salt
        return loss * float("nan") if bad else loss

    loop.flow_matching = spoiled


def test_a_bad_gradient_of_one_worker_takes_both_back_to_what_the_first_saved(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"steps": 7, "checkpoint_every": 3, "max_skips": 2, "workers": 2}
    stages = [make_stage("both", **settings)]
    ((both, history),) = train_together(
        stages, tracking_uri, tmp_path / "processes", spoil_the_second_worker
    )
    assert both["error"] is None
    assert both["events"] == [{"step": 6, "back_to": 3, "salt": 1}]
    assert all(np.isfinite(metrics["loss"]) for metrics in history.values() if "loss" in metrics)
    assert both["metrics"]["skipped_updates"] == 0


def test_features_in_an_object_store_train_as_pictures_do(
    make_stage: MakeStage,
    edit_data: str,
    held_out_data: str,
    features: str,
    tracking_uri: str,
    tmp_path: Path,
    s3: str,
) -> None:
    storage.upload_folder(features, f"{s3}/features")
    held_out = {"data": [held_out_data], "samples": 3, "steps": 2}
    settings = {"workers": 2, "validation": held_out}
    stages = [
        make_stage("pictures", data=[edit_data], **settings),
        make_stage("features", data=[f"{s3}/features"], cache_features=False, **settings),
    ]
    (one, pictures), (two, stored) = train_together(stages, tracking_uri, tmp_path / "processes")
    assert one["error"] is two["error"] is None
    # bfloat16 against float16
    assert losses_of(stored) == pytest.approx(losses_of(pictures), rel=1e-2)
    # Validation is painted from ordinary shards.
    losses = [answer["metrics"]["validation_loss"] for answer in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)


def test_what_one_worker_cannot_use_stops_all_with_one_line(
    make_stage: MakeStage,
    make_dataset: Callable[..., str],
    edit_data: str,
    features: str,
    tiny_model_dir: Path,
    tracking_uri: str,
    tmp_path: Path,
) -> None:
    other = model.load(tiny_model_dir)
    other.autoencoder.network.register_to_config(scaling_factor=0.5)
    other.save(tmp_path / "other")
    row = {"id": "bad", "index": 0, "source": "s", "instruction": "x", "blueprint": "y"}
    broken = make_dataset("broken", [row | {"image": b"no", "image_target": b"no"}], records.EDIT)
    stages = [
        make_stage("stale", workers=2, init=str(tmp_path / "other")),
        make_stage("bad", workers=2, data=[edit_data, broken], steps=12),
    ]
    (stale, _), (bad, _) = train_together(stages, tracking_uri, tmp_path / "processes")
    assert isinstance(stale["error"], InputError) and "\n" not in str(stale["error"])
    assert f"the features in {features} are stale" in str(stale["error"])
    assert "the weights or the scale of the autoencoder" in str(stale["error"])
    assert isinstance(bad["error"], TooManyBadSamples)
    assert re.search("1 undecodable.*, more than .*sample bad", str(bad["error"]))


def test_replaced_samples_are_the_same_on_one_worker_and_on_two(
    make_stage: MakeStage, make_dataset: Callable[..., str], tracking_uri: str, tmp_path: Path
) -> None:
    rows = edit_rows(12)
    rows[3]["image"] = b"\xff\xd8\xff\xe0 no picture"
    rows[8]["image_target"] = rows[8]["image_target"][:300]
    settings = {
        "data": [make_dataset("flawed", rows, records.EDIT)],
        "cache_features": False,
        "bad_samples": 0.5,
        "batch_size": 4,
        "steps": 7,
    }
    stages = [make_stage(str(workers), workers=workers, **settings) for workers in (1, 2)]
    (one, alone), (two, both) = train_together(stages, tracking_uri, tmp_path / "processes")
    replaced = [answer["metrics"]["bad_samples_undecodable"] for answer in (one, two)]
    assert replaced[0] == replaced[1] >= 4  # more than two epochs, with two bad samples each
    assert len(losses_of(alone)) == 7
    assert losses_of(both) == pytest.approx(losses_of(alone), rel=1e-4)
    assert apart(weights_of(tmp_path / "2"), weights_of(tmp_path / "1")) < 1e-4


def be_told_and_be_killed(rank: int) -> None:
    """Of the second worker: SIGTERM before step 3 of ``told``; death in ``killed``, half way
    through the writing of its file of step 4. Each happens once.
    """
    update, write = loop.update, Snapshot.write

    def told(worker: Any, step: int) -> Any:
        out = Path(worker.config.out)
        if rank == 1 and step == 2 and out.name == "told" and once(out.with_name("was-told")):
            os.kill(os.getpid(), signal.SIGTERM)
        return update(worker, step)

    def killed(self: Snapshot, store: Store, name: str) -> Any:
        out = Path(store.root).parent
        late = rank == 1 and out.name == "killed" and "step-00000004" in name
        if late and once(out.with_name("died")):
            Path(store.path(name)).parent.mkdir(parents=True, exist_ok=True)
            Path(store.path(name)).write_bytes(bytes(100))
            os.kill(os.getpid(), signal.SIGKILL)
        return write(self, store, name)

    loop.update, Snapshot.write = told, killed


def once(mark: Path) -> bool:
    """Whether this is the first call; ``mark`` stands beside outputs, which rank 0 makes later."""
    there = mark.exists()
    mark.touch()
    return not there


def test_a_worker_that_is_told_to_end_or_killed_while_it_saves_changes_nothing(
    make_stage: MakeStage, tracking_uri: str, tmp_path: Path
) -> None:
    settings = {"steps": 6, "checkpoint_every": 2, "ema_decay": 0.9, "workers": 2}
    through, told, killed = (make_stage(name, **settings) for name in ("through", "told", "killed"))
    with pytest.raises(mp.ProcessRaisedException, match="ended after step 3"):
        train_together([through, told], tracking_uri, tmp_path / "first", be_told_and_be_killed)
    assert steps_saved(told.out) == [2, 3]
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        train_together([told, killed], tracking_uri, tmp_path / "second", be_told_and_be_killed)
    assert steps_saved(killed.out) == [2]
    assert (Path(killed.out) / "checkpoints" / "step-00000004").is_dir()
    ((answer, history),) = train_together(
        [killed], tracking_uri, tmp_path / "third", be_told_and_be_killed
    )
    assert answer["error"] is None
    assert min(step for step, metrics in history.items() if "loss" in metrics) == 3
    expected = weights_of(tmp_path / "through")
    for stage in (told, killed):
        assert torch.equal(weights_of(Path(stage.out)), expected), stage.out
