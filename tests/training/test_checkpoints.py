"""Checkpoints of a small state: written beside the training, found again, passed over, removed."""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tenacity.nap
import torch
from torch import nn

from dim.errors import CheckpointError, StorageError, StorageUnavailable
from dim.learning.ema import Ema
from dim.learning.optimizer import OptimizerSettings, make_optimizers
from infra import s3 as s3_module
from infra import storage
from tests import fault_proxy
from tests.fault_proxy import FaultProxy
from tests.training.saved import read_saved, steps_saved
from training import checkpoint_files, checkpoints
from training.checkpoint_files import Snapshot
from training.checkpoints import Checkpoints, Kept, UnsavedError, to_keep
from training.stage import StageConfig
from training.state import TrainState, tensors_of

Values = dict[str, torch.Tensor]


class Said:
    """Stands in for the log of a worker."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def opened(tmp_path: Path, said: Said) -> Callable[..., Checkpoints]:
    """``opened(key=value, …)``: the checkpoints of a stage, as its only worker handles them."""

    def open_them(**settings: Any) -> Checkpoints:
        return Checkpoints(stage(tmp_path, **settings), 0, None, said)

    return open_them


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a store that is away."""
    monkeypatch.setattr(tenacity.nap, "time", SimpleNamespace(sleep=lambda seconds: None))
    for module, name in (
        (checkpoints, "_WRITE_PATIENCE_S"),
        (checkpoint_files, "_READ_PATIENCE_S"),
    ):
        monkeypatch.setattr(module, name, 0.2)


def stage(out: Path | str, **settings: Any) -> StageConfig:
    values = {"stage": "edit1", "init": "m", "data": ["d"], "out": str(out), "steps": 9}
    values |= {"batch_size": 1, "learning_rate": 1e-3, "validation": {"data": ["d"]}}
    return StageConfig.model_validate(values | settings)


def new_state(optimizer: Any = "muon", seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3), nn.Conv2d(3, 3, 1))
    settings = OptimizerSettings(1e-2, (0.9, 0.99), 0.1)
    optimizers = make_optimizers(optimizer, module, settings)
    return TrainState(module, optimizers, Ema(module, 0.9), learning_rate=1e-3)


def advance(state: TrainState, steps: int = 1) -> TrainState:
    """Make updates that are functions of the step."""
    for _ in range(steps):
        generator = torch.Generator().manual_seed(state.step)
        for parameter in state.module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in state.optimizers:
            optimizer.step()
        assert state.ema is not None
        state.ema.update(state.step)
        state.module.zero_grad()
        state.step += 1
    return state


def copies(state: TrainState) -> Values:
    return {name: tensor.clone() for name, tensor in tensors_of(state).items()}


def assert_same(one: Values, other: Values) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def saved_at(here: Checkpoints, state: TrainState, *steps: int, **metrics: float) -> TrainState:
    """Advance to each of ``steps`` and save there."""
    for step in steps:
        here.save(advance(state, step - state.step), metrics)
        here.finish()
    return state


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(
    opened: Callable[..., Checkpoints], optimizer: str
) -> None:
    state = new_state(optimizer)
    state.events = [{"step": 1, "back_to": 0, "salt": 1}]
    state.skipped = 2
    saved_at(opened(), state, 3)
    other, here = new_state(optimizer, seed=1), opened()
    assert here.restore(other)
    assert (other.step, other.skipped, other.events) == (3, 2, state.events)
    assert here.latest.endswith("checkpoints/step-00000003")
    assert_same(copies(advance(other, 3)), copies(advance(state, 3)))


def test_what_is_saved_is_the_state_at_that_step_although_training_goes_on(
    opened: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, go_on = Snapshot.write, threading.Event()

    def slow(*arguments: Any) -> Any:
        assert go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(Snapshot, "write", slow)
    here, state = opened(), advance(new_state(), 2)
    then = copies(state)
    here.save(state, {})  # comes back although nothing can be written
    advance(state, 3)
    assert steps_saved(tmp_path) == []
    threading.Timer(0.2, go_on.set).start()
    here.save(state, {})  # waits for the one before: one is on its way at most
    assert steps_saved(tmp_path)[0] == 2
    here.finish()
    assert steps_saved(tmp_path) == [2, 5]
    assert_same(read_saved(tmp_path)[1], copies(state))
    (tmp_path / "checkpoints" / "step-00000005" / "manifest.json").unlink()
    assert_same(read_saved(tmp_path)[1], then)


def data_file(folder: Path) -> Path:
    (file,) = folder.glob("*.bin")
    return file


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def change_format(folder: Path) -> None:
    text = json.dumps({"format": 4})
    digest = checkpoint_files.hashlib.sha256(text.encode()).hexdigest()
    whole = json.dumps({"sha256": digest, "manifest": text})
    (folder / "manifest.json").write_text(whole)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: cut(data_file(folder)), ".bin is cut short"),
    "flipped": (lambda folder: flip(data_file(folder), 100), "a checksum in .*.bin is wrong"),
    "lost": (lambda folder: data_file(folder).unlink(), r"lacks 00000-\w+.bin"),
    "layout": (lambda folder: flip(next(folder.glob("layout*")), 9), "checksum of .*layout"),
    "manifest cut": (lambda folder: cut(folder / "manifest.json"), "manifest.json is not whole"),
    "manifest": (lambda folder: flip(folder / "manifest.json", 150), "checksum of .*manifest"),
    "unfinished": (lambda folder: (folder / "manifest.json").unlink(), "has no manifest.json"),
    "later format": (change_format, "has format 4, and this program reads 3"),
    "former": (lambda folder: (folder / "state.pt").touch(), r"a former version .*\(state.pt\)"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    opened: Callable[..., Checkpoints], tmp_path: Path, said: Said, damage: str
) -> None:
    spoil, reason = DAMAGES[damage]
    here = opened()
    state = saved_at(here, new_state(), 2)
    then = copies(state)
    saved_at(here, state, 4)
    spoil(tmp_path / "checkpoints" / "step-00000004")
    other, here = new_state(seed=1), opened()
    assert here.restore(other)
    assert other.step == 2
    assert_same(copies(other), then)
    (line,) = said.lines
    assert line.startswith("checkpoint step-00000004 is passed over: ")
    with pytest.raises(CheckpointError, match=reason):
        raise CheckpointError(line)
    # It does not count as one of the last, and is gone when a later one is there.
    saved_at(here, other, 3)
    assert steps_saved(tmp_path)[:2] == [2, 3]
    saved_at(here, other, 5)
    names = sorted(folder.name for folder in (tmp_path / "checkpoints").glob("step-*"))
    assert names == ["step-00000003", "step-00000005"]


def test_a_damaged_one_that_is_made_again_is_whole(
    opened: Callable[..., Checkpoints], tmp_path: Path, said: Said
) -> None:
    state = saved_at(opened(), new_state(), 2, 4)
    then = copies(state)
    cut(data_file(tmp_path / "checkpoints" / "step-00000004"))
    here, other = opened(), new_state(seed=1)
    here.restore(other)
    saved_at(here, other, 4)
    again = new_state(seed=2)
    assert opened().restore(again) and len(said.lines) == 1
    assert_same(copies(again), then)
    data_file(tmp_path / "checkpoints" / "step-00000004")  # there is one only


def test_where_none_can_be_used_the_run_does_not_begin_anew(
    opened: Callable[..., Checkpoints], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not opened().restore(new_state())
    begun = tmp_path / "checkpoints" / "step-00000002"
    begun.mkdir(parents=True)
    (begun / "00000-abc.bin").touch()
    assert not opened().restore(new_state())  # nothing was ever finished here
    assert "step-00000002 is passed over" in said.lines[0]
    saved_at(opened(), new_state(), 2, 4)
    for step in (2, 4):
        cut(data_file(tmp_path / "checkpoints" / f"step-{step:08d}"))
    wanted = r"none of the checkpoints in .* can be used; of the latest: .*00000004.* is cut short"
    with pytest.raises(CheckpointError, match=wanted):
        opened().restore(new_state())

    def refuse(*_: object) -> None:
        raise StorageError("cannot list s3://b/c: access denied")

    monkeypatch.setattr(storage.Store, "list", refuse)
    with pytest.raises(CheckpointError, match="cannot be looked for: .*access denied"):
        opened().restore(new_state())


def test_a_checkpoint_of_another_model_is_refused(
    opened: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    saved_at(opened(), new_state(), 2)
    smaller = new_state()
    smaller.ema = None
    with pytest.raises(CheckpointError, match="not fit the model, which has no ema.0.bias"):
        opened().restore(smaller)
    wider = new_state()
    wider.module[0] = nn.Linear(5, 6)
    with pytest.raises(CheckpointError, match=r"module.0.weight is \(6, 4\).*, not \(6, 5\)"):
        opened().restore(wider)
    assert steps_saved(tmp_path) == [2]


def test_an_optimizer_that_packs_its_moments_is_saved_and_loaded(
    opened: Callable[..., Checkpoints],
) -> None:
    class Packed(torch.Tensor):
        """As torchao's: a tensor that consists of others."""

        codes: torch.Tensor

        @staticmethod
        def __new__(cls, codes: torch.Tensor) -> Packed:
            return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

        def __init__(self, codes: torch.Tensor) -> None:
            self.codes = codes

        def __tensor_flatten__(self) -> tuple[list[str], list[object]]:
            return ["codes"], []

        @classmethod
        def __torch_dispatch__(cls, *_: Any) -> Any:
            raise NotImplementedError("it is not computed with here")

    class EightBit(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    kept = self.state[parameter]
                    if not kept:
                        zeros = torch.zeros(parameter.shape, dtype=torch.uint8)
                        kept |= {"step": 0, "moment": Packed(zeros)}
                    kept["step"] += 1
                    kept["moment"].codes += 3

    def fresh() -> TrainState:
        state = new_state("adamw")
        state.optimizers = [EightBit(state.module.parameters(), lr=1.0)]
        return state

    state, other = fresh(), fresh()
    saved_at(opened(), state, 2)
    assert opened().restore(other)
    for kept in other.optimizers[0].state.values():
        assert kept["step"] == 2 and kept["moment"].codes.eq(6).all()


def test_a_full_disk_costs_one_checkpoint_and_the_second_ends_the_run(
    opened: Callable[..., Checkpoints], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, state = opened(), new_state()
    then = copies(saved_at(here, state, 1))
    write, full = storage.Output.write, [True]

    def writes(self: storage.Output, data: Any) -> int:
        if full[0] and self.size > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    monkeypatch.setattr(storage.Output, "write", writes)
    here.save(advance(state), {})
    here.close()
    here.look()
    warning = "warning: a checkpoint was not written, the last one stays: cannot write "
    assert said.lines[0].startswith(warning)
    assert said.lines[0].endswith(": no space left on the disk")
    here.look()
    assert len(said.lines) == 1
    here.save(advance(state), {})  # the next is tried as usual
    with pytest.raises(UnsavedError, match="checkpoints cannot be written: .*no space left on"):
        here.save(advance(state), {})
    kept = tmp_path / "checkpoints"
    assert steps_saved(tmp_path) == [1] and {file.parent.name for file in kept.rglob("*.*")} == {
        "step-00000001"
    }
    here, other = opened(), new_state(seed=1)
    assert here.restore(other)
    assert_same(copies(other), then)
    here.save(advance(other), {})
    here.close()
    full[0] = False
    saved_at(here, other, 5)  # one that was written in between: the count starts anew
    full[0] = True
    here.save(advance(other), {})
    with pytest.raises(UnsavedError):
        here.finish()  # the last one must be there
    assert steps_saved(tmp_path) == [1, 5]


@pytest.fixture
def faulty(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """A server in front of the object store that is away when a test says so."""
    monkeypatch.setattr(s3_module, "ATTEMPTS", 1)
    with fault_proxy.running(s3_endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


def test_a_store_that_is_away_for_a_moment_is_waited_for(
    faulty: FaultProxy, s3: str, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, state = Checkpoints(stage(f"{s3}/out"), 0, None, said), new_state()
    saved_at(here, state, 1)
    monkeypatch.setattr(checkpoints, "_WRITE_PATIENCE_S", 60.0)
    start = faulty.requests
    faulty.busy = lambda number: number < start + 6
    then = copies(saved_at(here, state, 2))
    assert faulty.statuses[503] == 5 and said.lines == []
    assert steps_saved(f"{s3}/out") == [1, 2]

    monkeypatch.setattr(checkpoints, "_WRITE_PATIENCE_S", 0.0)
    faulty.busy = lambda number: True
    here.save(advance(state), {})
    with pytest.raises(StorageUnavailable):  # which is left to Ray Train
        here.finish()
    with pytest.raises(StorageUnavailable):
        Checkpoints(stage(f"{s3}/out"), 0, None, said).restore(new_state())
    faulty.busy = lambda number: False
    other = new_state(seed=1)
    assert Checkpoints(stage(f"{s3}/out"), 0, None, said).restore(other)
    assert_same(copies(other), then)


HOUR = 3600.0


def kept(*facts: tuple[float, float]) -> list[Kept]:
    """Checkpoints of the steps 1, 2, … with these hours and ``validation_exact``."""
    return [
        Kept(step, hours * HOUR, {"validation_exact": score})
        for step, (hours, score) in enumerate(facts, 1)
    ]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"keep_checkpoints": 1}, {5}),
        ({"keep_checkpoints": 2}, {4, 5}),
        ({"keep_checkpoints": 1, "keep_best": {}}, {2, 5}),
        ({"keep_checkpoints": 1, "keep_best": {"higher_is_better": False}}, {1, 5}),
        ({"keep_checkpoints": 1, "keep_best": {"metric": "validation_loss"}}, {5}),
        ({"keep_checkpoints": 1, "keep_hours": 2}, {1, 3, 5}),
        ({"keep_checkpoints": 1, "keep_hours": 2, "keep_best": {}}, {1, 2, 3, 5}),
    ],
)
def test_what_is_kept(settings: dict[str, Any], steps: set[int]) -> None:
    facts = kept((0.0, 0.1), (1.0, 0.9), (2.5, 0.9), (3.0, float("nan")), (4.5, 0.5))
    assert to_keep(facts, stage("out", **settings)) == steps


def test_what_is_superseded_goes_only_when_the_newer_one_is_there(
    opened: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"keep_checkpoints": 1, "keep_best": {}, "keep_hours": 100}
    here, state = opened(**settings), new_state()
    saved_at(here, state, 1, validation_exact=0.2)  # the first of its hours
    saved_at(here, state, 2, validation_exact=0.7)
    saved_at(here, state, 3, validation_exact=0.5)
    assert steps_saved(tmp_path) == [1, 2, 3]
    saved_at(here, state, 4)  # was not validated
    assert steps_saved(tmp_path) == [1, 2, 4]
    here, state = opened(**settings), new_state(seed=1)  # which knows it from the manifests
    here.restore(state)
    removed_with: list[list[int]] = []
    delete = storage.Store.delete

    def watched(self: storage.Store, name: str) -> None:
        removed_with.append(steps_saved(tmp_path))
        delete(self, name)

    monkeypatch.setattr(storage.Store, "delete", watched)
    saved_at(here, state, 5, validation_exact=0.8)
    assert steps_saved(tmp_path) == [1, 5]
    assert removed_with and all(5 in steps for steps in removed_with)


def test_a_metric_that_validation_lacks_is_said(
    opened: Callable[..., Checkpoints], said: Said
) -> None:
    here = opened(keep_best={"metric": "validation_exct"})
    saved_at(here, new_state(), 1, 2, validation_exact=0.5, loss=1.0)
    assert said.lines == [
        "warning: keep_best keeps nothing: validation has no validation_exct, but validation_exact"
    ]
