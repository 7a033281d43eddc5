"""One driver an output: who may begin, who must wait, who must stop."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dim.config import dump_config
from dim.errors import ConfigError, StorageError
from infra import storage
from infra.tracking import Tracking
from training import loop, owner
from training.owner import OWNER_FILE, Fence, LostOutputError, OutputTakenError, Owner, owning
from training.plan import Plan
from training.stage import StageConfig

OURS = {"token": "ours"}


@pytest.fixture(params=["tmp_path", "s3", "rclone_s3"])
def out(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """On a disk, in a store that heeds the conditions of a write, and in one that does not."""
    monkeypatch.setattr(owner, "_SETTLE_S", 0.5)
    return f"{request.getfixturevalue(request.param)}/out"


def hold(
    out: str, *, wait_s: float = 0, timeout_s: float = 30, said: list[str] | None = None
) -> Any:
    return owning(
        out, wait_s=wait_s, timeout_s=timeout_s, say=[].append if said is None else said.append
    )


def there(out: str) -> Owner:
    return Owner.model_validate_json(storage.open_store(out).read(OWNER_FILE))


def leave(out: str, **changes: Any) -> Owner:
    """The file of a driver on another machine."""
    values = {
        "token": "theirs",
        "host": "far",
        "pid": 7,
        "process": "boot pid:[1] 7 99",
        "job": "raysubmit_a",
        "since": "2026-11-20T10:00:00Z",
        "seen": "2026-11-20T10:30:00Z",
        "beat": 3,
        "timeout_s": 0.6,
    }
    found = Owner.model_validate(values | changes)
    storage.open_store(out).write(OWNER_FILE, found.packed())
    return found


def test_one_owner_at_a_time(out: str, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = {"metadata": {"job_submission_id": "raysubmit_b"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(metadata))
    with hold(out) as first:
        Fence(out, first.owner.token).confirm()
        who = f"{out} is being trained into by process {os.getpid()} on {socket.gethostname()}, "
        who = re.escape(who + "Ray job raysubmit_b (since 20")
        with pytest.raises(OutputTakenError, match=who) as caught, hold(out):
            raise AssertionError("two owners")
        assert "last sign of life 20" in str(caught.value) and "\n" not in str(caught.value)
        assert there(out).token == first.owner.token
    began = time.monotonic()
    with hold(out) as second:
        assert second.owner.token != first.owner.token
        with pytest.raises(LostOutputError, match=r"was taken over by process \d+ on .*: this run"):
            Fence(out, first.owner.token).confirm()
    assert time.monotonic() - began < 3


def test_of_many_that_begin_at_once_one_does(out: str) -> None:
    begun = threading.Barrier(3)

    def begin(_: int) -> str:
        begun.wait()
        try:
            with hold(out) as lease:
                time.sleep(1)
                Fence(out, lease.owner.token).confirm()
                return "won"
        except OutputTakenError:
            return "refused"

    with ThreadPoolExecutor(3) as pool:
        answers = list(pool.map(begin, range(3)))
    assert sorted(answers) == ["refused"] * 2 + ["won"]


def test_who_was_silent_for_long_is_dead(out: str) -> None:
    leave(out)
    said: list[str] = []
    began = time.monotonic()
    with hold(out, said=said) as lease:
        assert 0.6 <= time.monotonic() - began < 4
        assert there(out).token == lease.owner.token
    assert "by process 7 on far, Ray job raysubmit_a (since 2026-11-20 10:00:00+00:00" in said[0]
    assert said[1] == f"{out} was left by {leave(out)}, which is dead: taking over"


def beating(out: str, until: threading.Event, last: dict[str, Any]) -> None:
    for beat in range(4, 1000):
        if until.wait(0.1):
            leave(out, beat=beat, **last)
            return
        leave(out, beat=beat)


@pytest.mark.parametrize("last", [{"released": True}, {}])
def test_who_lives_on_another_machine_is_waited_for(tmp_path: Path, last: dict[str, Any]) -> None:
    out, ended = str(tmp_path / "out"), threading.Event()
    leave(out)
    thread = threading.Thread(target=beating, args=(out, ended, last))
    thread.start()
    try:
        with pytest.raises(OutputTakenError, match="by process 7 on far"), hold(out):
            raise AssertionError("two owners")
        threading.Timer(1.0, ended.set).start()
        began = time.monotonic()
        with hold(out, wait_s=60) as lease:
            assert ended.is_set() and time.monotonic() - began < 10
            assert there(out).token == lease.owner.token
    finally:
        ended.set()
        thread.join()


def test_a_process_of_this_machine_that_was_killed_is_not_waited_for(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    program = (
        "import time\nfrom training.owner import owning\n"
        f"with owning({out!r}, wait_s=0, timeout_s=600, say=print):\n"
        "    print('mine', flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "mine\n"
        with pytest.raises(OutputTakenError, match=f"by process {other.pid} on "), hold(out):
            raise AssertionError("two owners")
        other.send_signal(signal.SIGKILL)
    said: list[str] = []
    began = time.monotonic()
    with hold(out, said=said):
        assert time.monotonic() - began < 2
    assert f"process {other.pid} on" in said[0] and said[0].endswith("is dead: taking over")


def test_a_process_that_cannot_be_seen_is_not_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where /proc hides what others run."""
    out, read = str(tmp_path / "out"), Path.read_text

    def hide(path: Path, *options: Any) -> str:
        if path.name == "stat":
            raise PermissionError
        return read(path, *options)

    with hold(out) as lease:
        monkeypatch.setattr(Path, "read_text", hide)
        assert not owner._is_dead(lease.owner, 0) and not owner._lives_here(lease.owner)
        assert owner._is_dead(lease.owner, lease.owner.timeout_s)
        nobody = lease.owner.model_copy(update={"pid": 2**22 + 1})  # more than Linux gives
        assert owner._is_dead(nobody, 0)


def test_a_sign_of_life_that_comes_late_does_not_undo_the_end(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with hold(out) as lease:
        late = lease.owner.ticked()
    assert lease._write(late) and there(out).released


def test_who_lost_the_output_says_so_and_does_not_write_again(out: str) -> None:
    said: list[str] = []
    with hold(out, timeout_s=0.6, said=said):
        theirs = leave(out, beat=40)
        deadline = time.monotonic() + 10
        while not said and time.monotonic() < deadline:
            time.sleep(0.05)
    assert said == [f"{out} was lost to another driver: this one stops"]
    assert there(out) == theirs


def test_signs_of_life_go_on_after_the_store_was_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "out")
    with hold(out, timeout_s=0.6) as lease:
        with monkeypatch.context() as patch:

            def refuse(*_: object) -> None:
                raise StorageError("away")

            patch.setattr(storage.Store, "read_version", refuse)
            Fence(out, lease.owner.token).confirm()
            time.sleep(0.5)
        before = there(out).beat
        (tmp_path / "out" / OWNER_FILE).unlink()  # a file that is gone is written again
        time.sleep(0.5)
        assert there(out).beat > before and there(out).token == lease.owner.token
    assert there(out).released


def test_another_file_of_that_name_is_named(tmp_path: Path) -> None:
    (tmp_path / OWNER_FILE).write_text("{}")
    message = r"owner\.json does not say who trains there: delete it if nobody does"
    with pytest.raises(ConfigError, match=message), hold(str(tmp_path)):
        raise AssertionError("begun")


@pytest.mark.parametrize("step", [0, 2])
def test_workers_whose_output_was_lost_stop_and_write_no_more(
    step: int,
    alone: Any,
    tiny_model_dir: Path,
    edit_data: str,
    tracking_uri: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Before the first step, as after a restart of the workers, and on the way."""
    out = tmp_path / "out"
    alone.folder = out / "checkpoints"
    values = {"stage": "edit1", "init": str(tiny_model_dir), "data": [edit_data], "out": str(out)}
    values |= {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1}
    config, update = StageConfig.model_validate(values | {"log_every": 100}), loop.update
    leave(str(out), **OURS)

    def taken_over(worker: Any, number: int) -> Any:
        if number == step:
            leave(str(out))
        return update(worker, number)

    monkeypatch.setattr(loop, "update", taken_over)
    with Tracking(tracking_uri, "test").run("edit1") as run:
        plan = Plan(
            config=config,
            steps=4,
            rows=20,
            tracking_uri=tracking_uri,
            run_id=run.id,
            owner=OURS["token"] if step else "of a driver before",
        )
        answer = loop.train_loop_per_worker(dump_config(plan))
    assert isinstance(answer["error"], LostOutputError)
    assert "was taken over by process 7 on far" in str(answer["error"])
    assert len(list(out.glob("checkpoints/step-*"))) == step and not (out / "model").exists()
