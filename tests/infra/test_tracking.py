from __future__ import annotations

import json
import re
import socket
import warnings
from pathlib import Path

import mlflow
import pyarrow as pa
import pytest
from PIL import Image

import dim
from infra.tracking import Tracking, TrackingError, code_version, default_uri, flatten


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> Tracking:
    folder = tmp_path_factory.mktemp("tracking")
    return Tracking(f"sqlite:///{folder / 'mlflow.db'}", "test")


def client_of(tracking: Tracking) -> mlflow.MlflowClient:
    return mlflow.MlflowClient(tracking_uri=tracking.uri)


def test_a_run_holds_what_was_logged(tracking: Tracking, tmp_path: Path) -> None:
    note = tmp_path / "note.txt"
    note.write_text("kept", encoding="utf-8")
    with tracking.run("job", {"model": {"layers": 6}, "seed": 1}, {"kind": "unit"}) as run:
        run.log_metrics({"loss": 0.5}, step=3)
        run.log_metric_rows([(4, {"loss": 0.4}), (5, {"loss": 0.3, "rate": 7})])
        run.log_dict({"a": 1}, "summary.json")
        run.log_figure(Image.new("RGB", (8, 8)), "grid.png")
        run.log_artifact(note)
        run.set_tags({"more": "tags"})
    client = client_of(tracking)
    stored = client.get_run(run.id)
    assert stored.info.status == "FINISHED"
    assert stored.data.params == {"model.layers": "6", "seed": "1"}
    assert stored.data.tags["kind"] == "unit" and stored.data.tags["more"] == "tags"
    history = [(m.step, m.value) for m in client.get_metric_history(run.id, "loss")]
    assert sorted(history) == [(3, 0.5), (4, 0.4), (5, 0.3)]
    assert {a.path for a in client.list_artifacts(run.id)} == {
        "summary.json",
        "grid.png",
        "note.txt",
    }
    assert run.latest()[0]["rate"] == 7
    assert run.latest()[1]["kind"] == "unit"


def test_artifacts_lie_beside_the_database(tracking: Tracking) -> None:
    with tracking.run("job") as run:
        run.log_text("hello", "hello.txt")
    folder = Path(tracking.uri.removeprefix("sqlite:///")).parent / "mlartifacts"
    assert [path.read_text() for path in folder.rglob("hello.txt")] == ["hello"]


def test_a_run_that_raises_is_failed_and_the_error_goes_on(tracking: Tracking) -> None:
    with pytest.raises(KeyError), tracking.run("job") as run:
        raise KeyError("lost")
    assert client_of(tracking).get_run(run.id).info.status == "FAILED"


def test_a_run_is_continued_by_its_id(tracking: Tracking) -> None:
    with tracking.run("job", {"seed": 1}) as first:
        first.log_metrics({"loss": 1.0}, 1)
    with tracking.run("job", {"seed": 1}, run_id=first.id) as second:
        second.log_metrics({"loss": 0.5}, 2)
    assert second.id == first.id
    stored = client_of(tracking).get_run(first.id)
    assert stored.info.status == "FINISHED" and stored.data.metrics["loss"] == 0.5


def test_attach_to_an_unknown_run(tracking: Tracking) -> None:
    with pytest.raises(TrackingError, match="cannot find run nothing"):
        tracking.attach("nothing")


def test_more_parameters_and_metrics_than_one_request_takes(tracking: Tracking) -> None:
    with tracking.run("job", {f"p{i}": i for i in range(150)}) as run:
        run.log_metric_rows([(i, {"a": i}) for i in range(1200)])
    assert len(client_of(tracking).get_run(run.id).data.params) == 150
    assert run.latest()[0]["a"] == 1199


def test_flatten_names_nested_keys_with_dots_and_cuts_long_values() -> None:
    flat = flatten({"a": {"b": {"c": 1}}, "d": [1, 2], "e": "x" * 9000})
    assert flat["a.b.c"] == "1" and flat["d"] == "[1, 2]" and len(flat["e"]) == 6000


def test_a_server_that_is_not_there_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(TrackingError, match=f"MLflow at {uri} cannot"):
        Tracking(uri, "test")


def test_a_path_is_no_uri() -> None:
    with pytest.raises(TrackingError, match="not a tracking URI"):
        Tracking("some/folder", "test")


def test_a_database_that_cannot_be_made(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(TrackingError, match="cannot be opened"):
        Tracking(f"sqlite:///{blocked}/mlflow.db", "test")


def test_default_uri(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert default_uri(str(tmp_path)) == f"sqlite:///{tmp_path.resolve() / 'mlflow.db'}"
    assert default_uri(f"file://{tmp_path}") == default_uri(str(tmp_path))
    with pytest.raises(TrackingError, match=r"set tracking\.uri"):
        default_uri("s3://bucket/out")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert default_uri("s3://bucket/out") == "http://host:5000"


def test_data_sets_are_inputs_of_the_run(tracking: Tracking, tmp_path: Path) -> None:
    schema = pa.schema([("id", pa.string()), ("image", pa.large_binary()), ("width", pa.int32())])
    with warnings.catch_warnings(), tracking.run("job") as run:
        warnings.simplefilter("error", UserWarning)
        folder = str(tmp_path)
        run.log_dataset("raw", folder, "a" * 32, context="input", profile={"rows": 3})
        run.log_dataset("made", "s3://b/out", "b" * 32, context="output", schema=schema)
        run.log_dataset("drawn", None, "c" * 32, context="input")
    stored = {
        item.dataset.name: item
        for item in client_of(tracking).get_run(run.id).inputs.dataset_inputs
    }
    assert {name: item.tags[0].value for name, item in stored.items()} == {
        "raw": "input",
        "made": "output",
        "drawn": "input",
    }
    assert json.loads(stored["raw"].dataset.profile) == {"rows": 3}
    assert stored["raw"].dataset.digest == "a" * 32
    source = mlflow.data.get_source(stored["made"])
    assert json.loads(source.to_json()) == {"uri": "s3://b/out"}
    columns = json.loads(stored["made"].dataset.schema)["mlflow_colspec"]
    assert [(column["name"], column["type"]) for column in columns] == [
        ("id", "string"),
        ("image", "binary"),
        ("width", "integer"),
    ]


def test_the_code_has_a_version() -> None:
    tags = code_version()
    assert tags["dim.version"] == dim.__version__
    if (Path(dim.__file__).parents[1] / ".git").exists():
        assert re.fullmatch("[0-9a-f]{40}", tags["mlflow.source.git.commit"])
