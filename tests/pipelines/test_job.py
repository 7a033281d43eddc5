"""The frame of a job: what makes two runs the same, and what goes with an output that stands."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import ray.data
from pydantic import Field

from dim import records
from dim.config import HowOnly, StrictModel, what_decides
from dim.errors import DimError, InputError, StorageError
from infra.tracking import Run, TrackingError
from pipelines.edit import EditConfig
from pipelines.features import FeaturesConfig
from pipelines.filter import FilterPairsConfig
from pipelines.ingest import IngestConfig
from pipelines.job import Job, JobConfig, Remaining, TrackingConfig
from pipelines.outcome import to_table
from pipelines.outputs import card
from pipelines.outputs.manifest import MARKER, Manifest
from tests.pipelines.finished import edit_rows


class Inner(StrictModel):
    size: int = 1
    at_once: Annotated[int, HowOnly] = 1


class Outer(StrictModel):
    out: Annotated[str, HowOnly]
    rows: int = Field(5, ge=1)
    inner: Inner = Inner()
    maybe: Inner | None = None
    names: tuple[str, ...] = ("a",)


def test_only_what_decides_the_result_is_compared() -> None:
    values = {"out": "x", "rows": 7, "inner": {"size": 2, "at_once": 9}, "maybe": {"size": 3}}
    assert what_decides(Outer, values) == {
        "rows": 7,
        "inner": {"size": 2},
        "maybe": {"size": 3},
        "names": ["a"],
    }


def test_a_setting_that_was_not_there_yet_has_its_default() -> None:
    old = {"out": "x", "inner": {}, "gone": 1}
    assert what_decides(Outer, old) == {
        "rows": 5, "inner": {"size": 1}, "maybe": None, "names": ["a"], "gone": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        (EditConfig, {"workers", "cpus_per_worker", "batch_size", "engine"}),
        (FeaturesConfig, {"workers", "cpus_per_worker", "gpus_per_worker"}),
        (FilterPairsConfig, {"batch_size"}),
        (IngestConfig, set()),
    ],
)
def test_every_job_says_of_its_settings_which_only_say_how(
    kind: type[JobConfig], how: set[str]
) -> None:
    how = how | {"out", "tracking", "licences", "nodes_wait_s", "range_timeout_s"}
    decisive = what_decides(kind, {name: None for name in kind.model_fields})
    assert kind.model_fields.keys() - decisive.keys() == how


def test_limits_of_calls_and_of_fetching_only_say_how() -> None:
    calls = EditConfig(raw="r", designer="oracle", out="o").calls.model_dump()
    fetch = {"workers": 2, "per_host": 3, "user_agent": "me"}
    how = {
        *("in_flight", "timeout_s", "retries", "busy_s", "requests_per_minute"),
        *("tokens_per_minute", "input_price", "output_price", "budget", "hedge_after", "breaker"),
    }
    assert calls.keys() - what_decides(EditConfig, {"calls": calls})["calls"].keys() == how
    assert "workers" not in what_decides(IngestConfig, {"fetch": fetch})["fetch"]
    assert what_decides(IngestConfig, {"fetch": fetch})["fetch"]["user_agent"] == "me"


class Made(JobConfig):
    """A job of a few records."""

    shade: int = 3


def run(out: Path, *, again: bool = False, **settings: Any) -> Manifest:
    """``again``: it must find all done."""
    config = Made(out=str(out), **settings)
    job = Job("edit", config, records.EDIT, identity={}, rows=4, ranges=1)

    def build(work: Remaining) -> ray.data.Dataset:
        assert not again
        return ray.data.from_arrow(work.output.done(0, 4, [to_table(edit_rows(4), records.EDIT)]))

    return job.run(build)


pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_an_output_of_before_a_setting_is_not_made_otherwise(tmp_path: Path) -> None:
    run(tmp_path)
    file = tmp_path / "manifest.json"
    manifest = json.loads(file.read_text())
    del manifest["config"]["shade"]
    file.write_text(json.dumps(manifest))
    run(tmp_path, again=True)
    with pytest.raises(InputError, match="made otherwise .*shade"):
        run(tmp_path, again=True, shade=4)


def test_a_card_that_fails_leaves_a_good_output_and_is_made_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise StorageError("no space left on the disk")

    with monkeypatch.context() as patch:
        patch.setattr(card, "write", full)
        with pytest.raises(
            DimError, match="is finished and good, but for the card: no space left .* does that"
        ):
            run(tmp_path)
    assert (tmp_path / "manifest.json").is_file() and not (tmp_path / card.NAME).exists()
    made = run(tmp_path, again=True)
    assert made.counts.kept == 3 and (tmp_path / card.NAME).is_file()
    assert not (tmp_path / MARKER).exists()


def test_a_tracker_that_fails_at_the_end_is_told_by_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking = TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="e")
    told: list[dict[str, float]] = []

    def refuse(self: Run, *_: object) -> None:
        raise TrackingError("MLflow at x cannot log metrics: it is away")

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log_metrics", refuse)
        with pytest.raises(DimError, match="good, but for MLflow: MLflow at x cannot log"):
            run(tmp_path / "out", tracking=tracking)
    assert (tmp_path / "out" / card.NAME).is_file()
    monkeypatch.setattr(Run, "log_metrics", lambda self, metrics: told.append(metrics))
    run(tmp_path / "out", again=True, tracking=tracking)
    run(tmp_path / "out", again=True, tracking=tracking)
    report, cost = told
    assert report["kept"] == 3 and "seconds" not in report
    assert all(name.startswith("cost/") for name in cost)
