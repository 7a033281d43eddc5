"""What who runs a real server sees of it: ids, log lines, metrics and traces."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from PIL import Image

from dim.errors import ConfigError, DimError
from dim.images import encode_png
from infra.ports import free_port
from serving.app import read_args
from serving.config import ServingConfig
from serving.serve import Server, start, tracing

ROOT = Path(__file__).resolve().parents[2]
DASHBOARD = ROOT / "configs/grafana.json"
STEPS = 3


@pytest.fixture(scope="module")
def config(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> ServingConfig:
    return ServingConfig(
        model=str(tiny_model_dir),
        designers={"broken": f"replay:{broken(tmp_path_factory.mktemp('designer'))}"},
        port=free_port(),
        access_log=str(tmp_path_factory.mktemp("log")),
        tracing={"sampling_ratio": 1},
    )


def broken(folder: Path) -> Path:
    """Answers of a designer that has one, to another question."""
    file = folder / "answers.jsonl"
    file.write_text('{"instruction": "another", "blueprint": "none"}\n')
    return file


@pytest.fixture(scope="module")
def server(ray_cluster: None, config: ServingConfig) -> Iterator[Server]:
    server = start(config)
    yield server
    server.stop()


def edit(server: Server, id: str | None = None, **fields: Any) -> httpx.Response:
    return httpx.post(
        f"{server.url}/v1/images/edits",
        files={"image": encode_png(Image.new("RGB", (64, 64), "red"))},
        data={"prompt": "paint it", "steps": str(STEPS), "designer": "none", **fields},
        headers={} if id is None else {"x-request-id": id},
        timeout=60,
    )


def wait_for(condition: Callable[[], Any], seconds: float = 40) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.5)
    return found


def lines(config: ServingConfig) -> list[dict[str, Any]]:
    assert config.access_log is not None
    (file,) = Path(config.access_log.to).iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


def serve_logs() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs/serve"


def test_an_id_goes_with_a_request_through_all_of_it(server: Server, config: ServingConfig) -> None:
    given = edit(server, "shop-17")
    assert given.status_code == 200, given.text
    assert given.headers.get_list("x-request-id") == ["shop-17"]
    made = edit(server)
    (id,) = made.headers.get_list("x-request-id")
    deadline = time.monotonic() + 30  # a line is written when its answer has gone
    while not (logged := {line["request_id"]: line for line in lines(config)}).keys() >= {
        "shop-17",
        id,
    }:
        assert time.monotonic() < deadline, logged.keys()
        time.sleep(0.1)
    line = logged["shop-17"]
    assert (line["status"], line["route"], line["images"]) == (200, "/v1/images/edits", 1)
    assert 0 < line["painted_ms"] < line["ms"] and line["waited_ms"] >= 0
    assert edit(server, "a b").status_code == 400


def test_the_designer_s_log_has_the_id(server: Server, config: ServingConfig) -> None:
    answer = edit(server, "unlucky-1", designer="broken")
    assert answer.status_code == 502

    def said() -> list[str]:
        files = serve_logs().glob("replica_dim_designers_*.log")
        return [line for file in files for line in file.read_text().splitlines()]

    def ours() -> list[str]:
        return [line for line in said() if "unlucky-1" in line]

    assert any("has no answer for this image" in line for line in wait_for(ours))

    def line() -> list[dict[str, Any]]:
        return [each for each in lines(config) if each["request_id"] == "unlucky-1"]

    assert wait_for(line)[0]["designed_ms"] > 0


def complaints() -> list[str]:
    """What the ingress and the painter have said that went wrong: to Serve's log, and to Ray's."""
    texts = [file.read_text() for file in serve_logs().glob("replica_dim_[ip]*.log")]
    for file in serve_logs().parent.glob("worker-*.err"):
        if re.search(r"ServeReplica:dim:(ingress|painter)", text := file.read_text()):
            texts.append(text)
    words = re.compile("Traceback|never retrieved|Request failed")
    return [line for text in texts for line in text.splitlines() if words.search(line)]


def test_clients_that_close_their_stream_leave_a_line_each_and_no_traceback(
    server: Server, config: ServingConfig
) -> None:
    known = complaints()
    gone = {f"gone-{number}" for number in range(6)}
    for id in sorted(gone):
        with httpx.stream(
            "POST", f"{server.url}/v1/images/generations", timeout=60,
            json={"prompt": "x", "n": 10, "steps": 100, "stream": True, "partial_images": 3},
            headers={"x-request-id": id},
        ) as answer:  # fmt: skip
            next(answer.iter_lines())

    def left() -> list[dict[str, Any]]:
        return [line for line in lines(config) if line["request_id"] in gone]

    wait_for(lambda: len(left()) == len(gone))
    assert {(line["status"], line["complete"]) for line in left()} == {(200, False)}
    assert edit(server).status_code == 200
    assert complaints() == known


def exported(server: Server) -> dict[str, str]:
    """Every metric that the server tells of, and of which kind it is."""
    text = httpx.get(f"{server.url}/metrics", timeout=20).text
    return dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))


def documented() -> dict[str, str]:
    text = (ROOT / "docs/serving.md").read_text()
    return dict(re.findall(r"^\| `(ray_dim_\w+)` \| (\w+) \|", text, re.MULTILINE))


def test_the_metrics_are_those_that_are_documented(server: Server, config: ServingConfig) -> None:
    assert edit(server).status_code == 200
    wanted = documented()
    assert len(wanted) > 5

    def others() -> dict[str, str]:
        """All but Serve's."""
        return {
            name: kind
            for name, kind in exported(server).items()
            if not name.startswith("ray_serve_")
        }

    wait_for(lambda: others().keys() >= wanted.keys())
    assert others() == {**wanted, "dim_metrics_nodes": "gauge"}
    text = httpx.get(f"{server.url}/metrics").text
    assert 'dim_metrics_nodes{answered="yes"} 1\n' in text
    assert "paint it" not in text and str(config.model) not in text


def test_the_dashboard_shows_what_there_is(server: Server) -> None:
    assert edit(server).status_code == 200
    dashboard = json.loads(DASHBOARD.read_text())
    panels = dashboard["panels"]
    first = next(place for place, panel in enumerate(panels) if panel["title"] == "Serving")
    queries = [target["expr"] for panel in panels[first + 1 :] for target in panel["targets"]]
    queries.append(dashboard["templating"]["list"][1]["query"]["query"])
    names = {name for query in queries for name in re.findall(r"\bray_\w+", query)}
    assert len(names) > 8

    def there() -> set[str]:
        found = set()
        for name, kind in exported(server).items():
            found |= (
                {f"{name}_{part}" for part in ("bucket", "sum", "count")}
                if (kind == "histogram")
                else {name}
            )
        return found

    wait_for(lambda: names <= there())
    labels = set(re.findall(r"by \((?:le, ?)?(\w+)", " ".join(queries))) - {"le"}
    assert labels == {"route", "status", "replica", "deployment"}


def spans() -> list[dict[str, Any]]:
    """What was written to the files of all replicas, as one JSON object after the other."""
    found, decoder = [], json.JSONDecoder()
    for file in (serve_logs() / "spans").glob("*_tracing.json"):
        text = file.read_text().strip()
        while text:
            try:
                span, end = decoder.raw_decode(text)
            except ValueError:  # it is being written
                break
            found.append(span)
            text = text[end:].lstrip()
    return found


def trace_of(span: dict[str, Any]) -> str:
    return span["context"]["trace_id"]


def request_of(span: dict[str, Any]) -> str | None:
    return span["attributes"].get("request_id")


def test_a_trace_reaches_from_the_ingress_to_the_painter_s_steps(server: Server) -> None:
    answer = httpx.post(
        f"{server.url}/v1/images/generations",
        json={"prompt": "a cup", "steps": STEPS},
        headers={"x-request-id": "traced-1"},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text

    def ours() -> list[dict[str, Any]]:
        found = spans()
        traces = {trace_of(each) for each in found if request_of(each) == "traced-1"}
        assert len(traces) <= 1
        return [each for each in found if trace_of(each) in traces]

    ends = {"replica_handle_request ingress __call__", "replica_handle_request painter paint"}
    wait_for(lambda: ends <= {span["name"] for span in ours()})
    assert sum(span["name"] == "painter step" for span in ours()) == STEPS
    by_id = {span["context"]["span_id"]: span for span in ours()}
    step = next(span for span in ours() if span["name"] == "painter step")
    assert step["attributes"].keys() == {"dim.step", "dim.batch_size"}
    way = []
    while step is not None:
        way.append(step["name"])
        above = step["parent_id"]
        step = by_id.get(above)
    assert way == [
        "painter step",
        "replica_handle_request painter paint",
        "route_to_replica painter paint",
        "replica_handle_request ingress __call__",
    ]
    assert above is None
    assert "a cup" not in json.dumps(ours())


def test_tracing_is_said_where_serve_is_started(server: Server, config: ServingConfig) -> None:
    other = {"application": "other", "route_prefix": "/other", "port": config.port}
    with pytest.raises(DimError, match="Serve runs in this cluster already, and traces what"):
        start(config.model_copy(update=other))
    with pytest.raises(ConfigError, match="tracing is not theirs to say; write tracing_config"):
        read_args({"model": "m", "tracing": {}})
    assert tracing(ServingConfig(model="m")) is None
    with pytest.raises(ValueError, match="exporter"):
        ServingConfig(model="m", tracing={"exporter": "rm -rf /"})
