from __future__ import annotations

import json
import re
import shutil
import socket
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
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
    assert stored.data.metrics["rate"] == 7


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
    stored = client_of(tracking).get_run(run.id)
    assert len(stored.data.params) == 150 and stored.data.metrics["a"] == 1199


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


@pytest.fixture
def own(tmp_path: Path) -> Tracking:
    """A database of the test's own, to be spoilt."""
    return Tracking(f"sqlite:///{tmp_path / 'mlflow.db'}", "spoilt")


def test_a_deleted_experiment_is_named_with_both_ways_out(own: Tracking) -> None:
    client = client_of(own)
    found = client.get_experiment_by_name("spoilt")
    client.delete_experiment(found.experiment_id)
    with pytest.raises(TrackingError) as refused:
        Tracking(own.uri, "spoilt")
    assert "the experiment 'spoilt' was deleted there" in str(refused.value)
    assert "tracking.experiment=NAME" in str(refused.value)
    way = f"mlflow experiments restore --experiment-id {found.experiment_id}"
    assert f"MLFLOW_TRACKING_URI={own.uri} {way}" in str(refused.value)
    with pytest.raises(TrackingError, match=r"experiment 'spoilt' was deleted"), own.run("late"):
        pytest.fail("a run began in an experiment that is gone")
    client.restore_experiment(found.experiment_id)
    with Tracking(own.uri, "spoilt").run("again") as run:
        run.log_metrics({"a": 1})
    Tracking(own.uri, "another name")


def test_a_deleted_run_is_named_with_both_ways_out(own: Tracking) -> None:
    with own.run("job") as run:
        client_of(own).delete_run(run.id)
        with pytest.raises(
            TrackingError, match=f"run {run.id} was deleted; restore it with 'mlflo"
        ):
            run.log_metrics({"a": 1})
        client_of(own).restore_run(run.id)
    client_of(own).delete_run(run.id)
    with (
        pytest.raises(
            TrackingError, match=f"run {run.id} was deleted there.*restore .* or begin a"
        ),
        own.run("job", run_id=run.id),
    ):
        pytest.fail("a deleted run went on")
    with pytest.raises(
        TrackingError, match=r"there is no such run; .*tracking\.uri.* or begin anew"
    ):
        own.attach("0" * 32)


def test_two_jobs_may_make_the_experiment_at_the_same_time(
    own: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    find, asked = mlflow.MlflowClient.get_experiment_by_name, []

    def too_early(client: mlflow.MlflowClient, name: str) -> object:
        asked.append(name)
        return None if len(asked) == 1 else find(client, name)

    monkeypatch.setattr(mlflow.MlflowClient, "get_experiment_by_name", too_early)
    with Tracking(own.uri, "spoilt").run("job"):
        assert asked == ["spoilt", "spoilt"]


def of_schema(version: str, path: Path, own: Tracking) -> str:
    """The URI of a copy of the database whose schema is called another one."""
    shutil.copy(own.uri.removeprefix("sqlite:///"), path)
    database = sqlite3.connect(path)
    database.execute("UPDATE alembic_version SET version_num = ?", (version,))
    database.commit()
    database.close()
    return f"sqlite:///{path}"


def test_a_database_of_another_mlflow_says_which_way_to_go(own: Tracking, tmp_path: Path) -> None:
    older = of_schema("451aebb31d03", tmp_path / "older.db", own)
    with pytest.raises(
        TrackingError, match="of an older MLflow: make a copy .* 'mlflow db upgrade'"
    ):
        Tracking(older)
    newer = of_schema("f00f00f00f00", tmp_path / "newer.db", own)
    with pytest.raises(
        TrackingError, match=f"a newer MLflow than {mlflow.__version__}.*install th"
    ):
        Tracking(newer)


@pytest.mark.parametrize(
    "uri",
    ["", "localhost:5000", "http//host", "sqlite:/a.db", "foo://bar", "http://", "https://[bad"],
)
def test_what_is_no_uri_says_what_one_is(uri: str) -> None:
    with pytest.raises(
        TrackingError, match=r"not a tracking URI; use sqlite:///FILE, http\(s\)://H"
    ):
        Tracking(uri)


@pytest.mark.parametrize("uri", ["sqlite:///", "sqlite://", "sqlite:///:memory:"])
def test_nothing_is_logged_to_where_it_is_lost(uri: str) -> None:
    with pytest.raises(TrackingError, match="kept in memory and lost; use sqlite:///FILE"):
        Tracking(uri)


def test_what_is_no_database_of_mlflow(tmp_path: Path) -> None:
    (tmp_path / "text.db").write_text("not a database, whatever it is called" * 40)
    (tmp_path / "folder.db").mkdir()
    for uri, complaint in {
        f"sqlite:///{tmp_path}/text.db": "that file is no SQLite database",
        f"sqlite:///{tmp_path}/folder.db": "cannot be opened for writing: see to its folder",
        "nosuchdriver+x://u:s3cret@host/db": "not a tracking URI",
        "mysql+pymysql://u:s3cret@host/db": "module pymysql .* is not installed",
        f"file://{tmp_path}/mlruns": "folders are no store of MLflow any more",
    }.items():
        with pytest.raises(TrackingError, match=complaint) as refused:
            Tracking(uri)
        assert "s3cret" not in str(refused.value)


@pytest.fixture
def answering() -> Iterator[Callable[[int, bytes], str]]:
    """``answering(status, body)``: the URI of a web server that always answers this."""
    servers = []

    def start(status: int, body: bytes) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, format: str, *args: object) -> None:
                """Keep the test's output clean."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_address[1]}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize(
    ("status", "body", "complaint"),
    [
        (200, b"<html>hello</html>", "no MLflow server; start one, or set tracking.uri"),
        (404, b"<html>hello</html>", "no MLflow server; start one, or set tracking.uri"),
        (401, b"who are you", "it wants a user: set MLFLOW_TRACKING_USERNAME"),
        (403, b"no", "this user may not do that: ask for the permission"),
        (403, b'{"error_code": "PERMISSION_DENIED", "message": "no"}', "this user may not do that"),
        (503, b"", "it answers HTTP 503; see to the server"),
    ],
)
def test_a_server_that_refuses_says_what_to_do(
    answering: Callable[[int, bytes], str],
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    body: bytes,
    complaint: str,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrackingError, match=complaint):
        Tracking(answering(status, body))


@pytest.mark.parametrize(
    ("host", "complaint"),
    [("127.0.0.1:1", "nothing listens there; start it"), ("no.invalid", "the host is not known")],
)
def test_no_server_at_all(host: str, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        TrackingError, match=rf"MLflow at http://\*\*\*@{host} .*{complaint}"
    ) as gone:
        Tracking(f"http://me:s3cret@{host}")
    assert gone.value.__cause__ is None  # whose text, and so a traceback, has the password


def test_files_that_cannot_be_stored_say_where_they_were_to_go(
    own: Tracking, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for place, complaint in {
        f"{tmp_path}/file/below": "Not a directory.*same on every machine",
        "gs://bucket/x": "Python package that is not installed",
        "mlflow-artifacts:/1": "only through the server that made the experiment",
    }.items():
        client_of(own).create_experiment(place, artifact_location=place)
        with (
            pytest.raises(TrackingError, match=f"cannot store a.json: .*{complaint}") as refused,
            Tracking(own.uri, place).run("job") as run,
        ):
            run.log_dict({}, "a.json")
        assert f"its files go to {place}" in str(refused.value)
        assert "another experiment: tracking.experiment=NAME" in str(refused.value)


def test_no_credentials_are_stored(own: Tracking, tmp_path: Path) -> None:
    secret = "https://me:s3cret@host/v1?api_key=s3cret"
    with own.run("job", {"designer": f"openai:m@{secret}"}, {"init": secret}) as run:
        run.log_dict({"config": [secret]}, "config.json")
        run.set_tags({"said": f"warning: {secret}"})
        run.log_dataset("in", secret, "a", context="input", profile={"uri": secret})
    params = client_of(own).get_run(run.id).data.params
    assert params == {"designer": "openai:m@https://***@host/v1?api_key=***"}
    stored = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert any(b"api_key=***" in path.read_bytes() for path in stored)
    assert not any(b"s3cret" in path.read_bytes() for path in stored)
