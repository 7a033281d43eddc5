"""What who runs a cluster sees of data jobs and training: log lines, metrics and traces."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import ray
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from ray._common.formatters import JSONFormatter

from dim.config import dump_config
from dim.errors import ConfigError, InputError
from infra import logs, metrics, tracing
from pipelines import edit, ingest
from pipelines.edit import EditConfig
from pipelines.filters import PairRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.ingest import IngestConfig
from pipelines.outcome import fail
from pipelines.outputs.manifest import Manifest
from tests.infra import spans
from training import loop
from training.log import RunLog
from training.plan import Plan
from training.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
OURS = re.compile(r"ray_dim_(data|model|train)_\w+")
LOOSE = PairRules(
    min_side=64, min_entropy=None, min_sharpness=None, max_text_area=None, max_shift=None,
    min_changed=None, min_ssim=None,
)  # fmt: skip
EDITS_KEPT = ("edit", "kept")
ALIKE = DuplicateRules(exact=False, max_distance=None)


def make(folder: Path, pairs: int) -> Manifest:
    """Tabletop pairs into DIM-Edit, with the oracle's blueprints."""
    ingest.run(IngestConfig(tabletop=pairs, out=str(folder / "raw"), rows_per_file=4))
    config = EditConfig(
        raw=str(folder / "raw"), out=str(folder / "edit"), designer="oracle", filters=LOOSE,
        duplicates=ALIKE,
    )  # fmt: skip
    return edit.run(config)


def wait_for(condition: Callable[[], Any], seconds: float = 120) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.5)
    return found


def exported() -> str:
    node = ray.nodes()[0]
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    return httpx.get(address, timeout=20).text


def documented() -> dict[str, str]:
    text = (ROOT / "docs/operating.md").read_text()
    return dict(re.findall(r"^\| `(ray_dim_\w+)` \| (\w+) \|", text, re.MULTILINE))


def value_of(text: str, name: str, **tags: str) -> float:
    """The sum of a metric's values that have these tags."""
    wanted = [f'{key}="{value}"' for key, value in tags.items()]
    lines = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", text, re.MULTILINE)
    return sum(float(value) for found, value in lines if all(each in found for each in wanted))


def test_metrics_are_documented_exported_and_shown(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = documented()
    dashboard = (ROOT / "configs/grafana.json").read_text()
    shown = {re.sub("_bucket$", "", name[0]) for name in re.finditer(OURS, dashboard)}
    assert shown == kinds.keys()
    told = {name: as_well(monkeypatch, name) for name in ("records", "ranges")}
    manifest = make(tmp_path, 8)
    kept = [count for job, outcome, count, *_ in told["records"] if (job, outcome) == EDITS_KEPT]
    assert sum(kept) == manifest.counts.kept == 8
    ranges = [rest for job, *rest in told["ranges"] if job == "edit"]
    assert ranges[-1] == [1, 1]
    # Under names of their own: other tests' jobs and stages are on the same Ray.
    metrics.of_jobs().records("tried", "kept", 8)
    metrics.of_calls().answered("answered", (1500, 300), 0.01, 2.0)
    metrics.of_training().line("tried", 64, dict.fromkeys(metrics._TRAINING, 0.5))

    def there() -> dict[str, str]:
        found = dict(re.findall(r"^# TYPE (\w+) (\w+)$", exported(), re.MULTILINE))
        return {name: kind for name, kind in found.items() if OURS.fullmatch(name)}

    wait_for(lambda: there().keys() >= kinds.keys())
    assert there() == kinds
    wait_for(lambda: value_of(exported(), "ray_dim_data_records_total", job="tried") == 8)
    wait_for(lambda: value_of(exported(), "ray_dim_train_loss", stage="tried") == 0.5)


def as_well(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """What a method of the jobs' metrics is told from now on."""
    told: list[tuple[Any, ...]] = []
    method = getattr(metrics.JobMetrics, name)

    def telling(self: metrics.JobMetrics, *values: Any) -> None:
        told.append(values)
        method(self, *values)

    monkeypatch.setattr(metrics.JobMetrics, name, telling)
    return told


def test_a_stage_s_lines_are_counted_by_the_first_worker_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Counted:
        seen: list[tuple[Any, ...]] = []

        def line(self, *said: Any) -> None:
            self.seen.append(said)

    monkeypatch.setattr("training.log.of_training", Counted)
    RunLog(None, stage="edit2").count(32, {"loss": 1.0})
    RunLog(object(), stage="edit2").count(32, {"loss": 1.0})  # type: ignore[arg-type]
    assert Counted.seen == [("edit2", 32, {"loss": 1.0})]


def test_a_trace_reaches_from_the_job_to_the_stages_in_the_workers(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracing.VARIABLE, "tests.infra.spans:processors")
    make(tmp_path, 8)

    def ours() -> list[dict[str, Any]]:
        out = str(tmp_path / "edit")
        whole = spans.found()
        traces = {
            each["context"]["trace_id"] for each in whole
            if each["name"] == "data edit" and each["attributes"]["dim.output"].endswith(out)
        }  # fmt: skip
        return [each for each in whole if each["context"]["trace_id"] in traces]

    wanted = {"data edit", "filter and duplicates", "range", "WriteBlueprints"}
    wait_for(lambda: wanted <= {each["name"] for each in ours()})
    by_id = {each["context"]["span_id"]: each for each in ours()}
    span, way = next(each for each in by_id.values() if each["name"] == "WriteBlueprints"), []
    while span is not None:
        way.append(span["name"])
        span = by_id.get(span["parent_id"])
    assert way == ["WriteBlueprints", "range", "data edit"]
    assert len({each["context"]["trace_id"] for each in ours()}) == 1


def test_nothing_is_traced_unless_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tracing.VARIABLE, raising=False)
    place = tracing.here()
    with place.span("data edit"), tracing.span("range"):
        assert tracing.here() == place == tracing.Trace()


def test_a_trace_goes_on_with_the_one_that_it_was_started_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    monkeypatch.setenv(tracing.VARIABLE, "tests.infra.test_observed_jobs:nothing")
    monkeypatch.setenv(tracing.PARENT, parent)
    assert tracing.here().parent == parent
    with tracing.here().span("data edit"):
        assert tracing.here().parent.split("-")[1] == parent.split("-")[1]
        assert tracing.here().parent != parent


def nothing() -> list[Any]:
    """Span processors, none."""
    return []


MEMORY = InMemorySpanExporter()


def memory() -> list[SimpleSpanProcessor]:
    """Spans that stay in this process."""
    return [SimpleSpanProcessor(MEMORY)]


def test_what_a_training_worker_does_is_below_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.VARIABLE, "tests.infra.test_observed_jobs:memory")
    config = StageConfig(
        stage="edit2", init="m", data=["d"], out="o", text="blueprint", steps=1, batch_size=1,
        learning_rate=1e-4,
    )  # fmt: skip
    with tracing.here().span("train edit2", output="s3://key:secret@bucket/out"):
        plan = Plan(
            config=config, steps=1, rows=1, tracking_uri="", run_id="r", trace=tracing.here()
        )
    told = Plan.model_validate(dump_config(plan))  # as Ray Train takes it to a worker
    with (
        pytest.raises(InputError),
        told.trace.span("worker", stage="edit2", rank=0),
    ):
        assert loop.validate(SimpleNamespace(validation=None)) == {}  # type: ignore[arg-type]
        raise InputError("of a record: its text")
    named = {each.name: each for each in MEMORY.get_finished_spans()}
    validation, worker, stage = named["validation"], named["worker"], named["train edit2"]
    assert validation.parent == worker.context and worker.parent.span_id == stage.context.span_id
    assert (worker.status.status_code.name, worker.status.description) == ("ERROR", "InputError")
    assert not worker.events and "secret" not in stage.to_json()


@pytest.mark.parametrize("wrong", ["nowhere.telemetry:processors", "json:nothing", "json"])
def test_an_exporter_that_is_none_is_named(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracing.VARIABLE, wrong)
    with (
        pytest.raises(ConfigError, match=rf"DIM_TRACING={wrong}: it must be a function"),
        tracing.here().span("data edit"),
    ):
        pass


@pytest.fixture
def structured() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What Ray's structured logging would write in this process."""
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(JSONFormatter())
    logging.getLogger().addHandler(handler)
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    logging.getLogger().removeHandler(handler)


def test_a_record_that_fails_is_a_line_with_its_ids(
    structured: Callable[[], list[dict[str, Any]]],
) -> None:
    fail({"id": "pair-7", "image": b"x"}, "blueprint", "no answer from https://me:pw@host/v1")
    (line,) = structured()
    assert (line["message"], line["stage"], line["record"]) == (
        "record failed", "blueprint", "pair-7",
    )  # fmt: skip
    assert "no answer" in line["error"] and "me:pw" not in json.dumps(line)


def test_without_structured_logs_there_is_not_a_word(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    fail({"id": "pair-7"}, "blueprint", "no answer")
    assert not caplog.records and capfd.readouterr().err == ""


def test_the_variable_knows_json_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(logs.VARIABLE, "xml")
    with pytest.raises(ConfigError, match="DIM_LOG=xml: only json is known"):
        logs.ray_logging()


def test_driver_and_workers_of_a_job_log_json_with_their_ids(
    ray_cluster: None, tmp_path: Path
) -> None:
    out = str(tmp_path / "raw")
    address = ray.get_runtime_context().gcs_address
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.ingest", "--tabletop", "4", "--out", out],
        env={**os.environ, "DIM_LOG": "json", "RAY_ADDRESS": address},
        cwd=ROOT, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    said = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    ours = {line["message"]: line for line in said if line.get("output", "").endswith(out)}
    assert ours.keys() == {"job begun", "range done", "job done"}
    assert ours["range done"]["kept"] == 4 and ours["job done"]["data_job"] == "ingest"
    job = ours["job begun"]["job_id"]
    session = Path(ray._private.worker._global_node.get_session_dir_path())

    def written() -> list[dict[str, Any]]:
        text = "\n".join(f.read_text() for f in (session / "logs").glob(f"worker-*-{job}-*.err"))
        lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
        return [line for line in lines if line["message"] == "range written"]

    (line,) = wait_for(written)
    assert (line["job_id"], line["range"], line["records"]) == (job, 0, 4)
    assert line["output"] == ours["job begun"]["output"] and line["task_id"] and line["node_id"]
