"""Experiment tracking: a thin layer over MLflow that every job and training stage logs through.

MLflow's client is used instead of its module-level functions, because those keep one "active run"
per process and a driver may have several jobs going. Every failure of the tracker is a
``TrackingError`` that names its URI and says what to do. Credentials of the addresses that are
logged stay here.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlparse

import pyarrow as pa

from dim import __version__
from dim.errors import DimError
from dim.redaction import redact, redacted
from infra import tracking_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset

ResultT = TypeVar("ResultT")

PARENT_RUN = "DIM_PARENT_RUN"
"""The variable that makes the runs of a process children of the run whose id it holds."""

_MAX_PARAM_LENGTH = 6000  # MLflow refuses longer parameter values
_MAX_BATCH = 1000  # MLflow refuses more metrics in one request


class TrackingError(DimError):
    """The experiment tracker cannot be reached or refused what was logged."""


def default_uri(out: str) -> str:
    """Where a job that writes to ``out`` logs when its configuration names no tracker.

    ``MLFLOW_TRACKING_URI`` if set, else an SQLite file in the output folder.

    Raises:
        TrackingError: ``out`` is no local folder, where SQLite cannot live, and nothing is set.
    """
    if configured := os.environ.get("MLFLOW_TRACKING_URI"):
        return configured
    parsed = urlparse(out)
    if parsed.scheme not in ("", "file"):
        raise TrackingError(
            f"{out} is no local folder, so its MLflow database has no default place: "
            "set tracking.uri or MLFLOW_TRACKING_URI"
        )
    folder = Path(parsed.path if parsed.scheme == "file" else out).expanduser().resolve()
    return f"sqlite:///{folder / 'mlflow.db'}"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as MLflow parameters: ``{"a": {"b": 1}}`` gives ``{"a.b": "1"}``."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
        else:
            flat[name] = str(value)[:_MAX_PARAM_LENGTH]
    return flat


class Tracking:
    """One experiment of one MLflow store.

    Args:
        uri: An MLflow tracking URI. For ``sqlite:///FILE`` the folder is created and artifacts
            go to ``mlartifacts/`` beside the file; otherwise the server decides where they go.
        experiment: The experiment's name, created when missing.

    Raises:
        TrackingError: the store cannot be opened.
    """

    def __init__(self, uri: str, experiment: str = "dim") -> None:
        self.uri = uri
        self.experiment = experiment
        self._client = self._call("be opened", lambda: _open_client(uri))
        self._experiment_id, self._files = self._call("hold the experiment", self._find_or_create)

    @contextmanager
    def run(
        self,
        name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, str] | None = None,
        *,
        run_id: str | None = None,
    ) -> Iterator[Run]:
        """Log inside a run; it ends FINISHED, or FAILED (KILLED on Ctrl-C) when the body raises.

        Args:
            name: Shown in the MLflow UI.
            params: A possibly nested configuration, logged flattened. Not logged again when an
                earlier run is continued.
            tags: MLflow tags.
            run_id: Continue this run instead of starting one.
        """
        run = self._continue(run_id) if run_id else self._create(name, params or {}, tags or {})
        try:
            yield run
        except BaseException as error:
            killed = isinstance(error, KeyboardInterrupt)
            self._try_terminate(run, "KILLED" if killed else "FAILED")
            raise
        self._call("end the run", lambda: self._client.set_terminated(run.id, "FINISHED"))

    def attach(self, run_id: str) -> Run:
        """Log into a run whose life another process governs (a training worker uses this)."""
        found = self._call(f"find run {run_id}", lambda: self._client.get_run(run_id))
        if found.info.lifecycle_stage == "deleted":
            raise self._error("continue the run", tracking_errors.deleted_run(run_id))
        return Run(self, run_id)

    def _create(self, name: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Run:
        def start() -> str:
            from mlflow.entities import Param

            parent = os.environ.get(PARENT_RUN)
            told = {**tags, "mlflow.parentRunId": parent} if parent else tags
            run_id: str = self._client.create_run(
                self._experiment_id, run_name=name, tags=redacted(told)
            ).info.run_id
            entries = [Param(key, value) for key, value in flatten(redacted(params)).items()]
            for first in range(0, len(entries), 100):  # MLflow takes 100 parameters a request
                self._client.log_batch(run_id, params=entries[first : first + 100])
            return run_id

        return Run(self, self._call("start a run", start))

    def _continue(self, run_id: str) -> Run:
        run = self.attach(run_id)
        self._call("continue the run", lambda: self._client.update_run(run_id, status="RUNNING"))
        return run

    def _try_terminate(self, run: Run, status: str) -> None:
        try:
            self._client.set_terminated(run.id, status)
        except Exception:  # the body's own error is what the user must see
            logging.getLogger(__name__).warning("MLflow run %s stays open", run.id)

    def _find_or_create(self) -> tuple[str, str]:
        """The experiment's id, and where the files of its runs go."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(self.experiment)
        if found is None:
            location = None
            if database := _sqlite_file(self.uri):
                location = (database.parent / "mlartifacts").as_uri()
            try:
                made = self._client.create_experiment(self.experiment, artifact_location=location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another job was faster
                    raise
                found = self._client.get_experiment_by_name(self.experiment)
            else:
                found = self._client.get_experiment(made)
        if found.lifecycle_stage == "deleted":
            identity = (found.name, found.experiment_id, self.uri)
            raise self._error("hold the experiment", tracking_errors.deleted_experiment(*identity))
        return str(found.experiment_id), str(found.artifact_location)

    def _call(self, what: str, action: Callable[[], ResultT]) -> ResultT:
        return call(self.uri, what, action, self.experiment)

    def _store(self, name: str, action: Callable[[], ResultT]) -> ResultT:
        """The same for a file of a run, which goes elsewhere than what the run says."""
        if self._files.startswith("mlflow-artifacts:") and urlparse(self.uri).hostname:
            return self._call(f"store {name}", action)  # it goes through the server
        try:
            return action()
        except Exception as error:
            reason = tracking_errors.explain_file(error, self._files)
            raise self._error(f"store {name}", reason) from _harmless(error)

    def _error(self, what: str, reason: str) -> TrackingError:
        return _error(self.uri, what, reason)


def open_client(uri: str) -> MlflowClient:
    """A client of the MLflow store at ``uri``.

    Raises:
        TrackingError: it cannot be opened.
    """
    return call(uri, "be opened", lambda: _open_client(uri))


def call(uri: str, what: str, action: Callable[[], ResultT], experiment: str = "dim") -> ResultT:
    """What ``action`` of a client gives.

    Raises:
        TrackingError: MLflow at ``uri`` cannot do ``what``, and why.
    """
    try:
        return action()
    except TrackingError:
        raise
    except Exception as error:
        reason = tracking_errors.explain(error, experiment, uri)
        raise _error(uri, what, reason) from _harmless(error)


def _error(uri: str, what: str, reason: str) -> TrackingError:
    return TrackingError(f"MLflow at {uri} cannot {what}: {reason}")


def _harmless(error: Exception) -> Exception | None:
    """The cause of an error, unless it shows credentials: tracebacks show it too."""
    text = str(error)
    return error if redact(text) == text else None


class Run:
    """One MLflow run being logged to. ``id`` is MLflow's run id."""

    def __init__(self, tracking: Tracking, run_id: str) -> None:
        self.id = run_id
        self._tracking = tracking
        self._client: MlflowClient = tracking._client

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at ``step``."""
        self.log_metric_rows([(step, metrics)])

    def log_metric_rows(
        self, rows: Sequence[tuple[int, Mapping[str, float]]], timestamp_ms: int | None = None
    ) -> None:
        """Log many ``(step, metrics)`` rows in as few requests as possible."""

        def send() -> None:
            from mlflow.entities import Metric

            now = int(time.time() * 1000) if timestamp_ms is None else timestamp_ms
            entries = [
                Metric(key, float(value), now, step)
                for step, metrics in rows
                for key, value in metrics.items()
            ]
            for first in range(0, len(entries), _MAX_BATCH):
                self._client.log_batch(self.id, metrics=entries[first : first + _MAX_BATCH])

        self._tracking._call("log metrics", send)

    def metrics(self) -> dict[str, float]:
        """The latest value of each metric that was logged."""
        run = self._tracking._call("be read", lambda: self._client.get_run(self.id))
        return dict(run.data.metrics)

    def log_dict(self, values: Mapping[str, Any], name: str) -> None:
        """Store ``values`` as the artifact ``name`` (``.json`` or ``.yaml``)."""
        self._tracking._store(name, lambda: self._client.log_dict(self.id, redacted(values), name))

    def log_figure(self, figure: Any, name: str) -> None:
        """Store a ``PIL.Image`` or a matplotlib figure as the artifact ``name`` (``.png``)."""
        log: Callable[..., None] = self._client.log_figure
        if not hasattr(figure, "savefig"):
            log = self._client.log_image
        self._tracking._store(name, lambda: log(self.id, figure, artifact_file=name))

    def log_text(self, text: str, name: str) -> None:
        """Store ``text`` as the artifact ``name``."""
        self._tracking._store(name, lambda: self._client.log_text(self.id, text, name))

    def log_artifact(self, path: str | Path, folder: str | None = None) -> None:
        """Copy a local file into the run's artifacts, under ``folder``."""
        self._tracking._store(
            str(path), lambda: self._client.log_artifact(self.id, str(path), folder)
        )

    def log_dataset(
        self,
        name: str,
        uri: str | None,
        digest: str,
        *,
        context: str,
        schema: pa.Schema | None = None,
        profile: Mapping[str, Any] | None = None,
        tags: Mapping[str, object] | None = None,
    ) -> None:
        """Record a data set that the run read or wrote.

        MLflow keeps one data set of a name and digest in an experiment, so its schema and profile
        are those of the first run that had it; ``tags`` are the run's own.

        Args:
            name: what MLflow calls it.
            uri: where it lies: a path, ``s3://…``; ``None`` if it is made by the program itself.
            digest: the same exactly when the data is, at most 36 characters.
            context: ``input`` or ``output``.
            schema: its columns.
            profile: numbers about it.
            tags: what the run did with it.
        """

        def send() -> None:
            from mlflow.entities import DatasetInput, InputTag
            from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

            dataset = _dataset(name, uri, digest, schema, profile or {})
            told = {MLFLOW_DATASET_CONTEXT: context, **(tags or {})}
            labels = [InputTag(key, str(value)) for key, value in told.items()]
            self._client.log_inputs(self.id, [DatasetInput(dataset, labels)])

        self._tracking._call(f"record the data set {name}", send)

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set MLflow tags on the run."""

        def send() -> None:
            for key, value in tags.items():
                self._client.set_tag(self.id, key, redact(value))

        self._tracking._call("set tags", send)


def code_version() -> dict[str, str]:
    """The version of this program as MLflow tags: the package's, and the commit of a checkout."""
    tags = {"dim.version": __version__}
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():  # or the commit would be of a repository this is installed in
        with suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "HEAD"],
                capture_output=True, check=True, text=True, timeout=10,
            )  # fmt: skip
            tags["mlflow.source.git.commit"] = found.stdout.strip()
    return tags


def _dataset(
    name: str, uri: str | None, digest: str, schema: pa.Schema | None, profile: Mapping[str, Any]
) -> Dataset:
    """A data set of MLflow's that says where files lie, and does not read them."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import Dataset
    from mlflow.types.schema import ColSpec, DataType, Schema

    def column(field: pa.Field) -> ColSpec:
        kinds = {"string": DataType.string, "int32": DataType.integer, "int64": DataType.long,
                 "float": DataType.float, "double": DataType.double,
                 "bool": DataType.boolean}  # fmt: skip
        return ColSpec(kinds.get(str(field.type), DataType.binary), field.name)

    columns = Schema([column(field) for field in schema]) if schema is not None else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that a path may be two kinds of local source
        source = resolve_dataset_source(redact(uri)) if uri else CodeDatasetSource(code_version())
    described = MetaDataset(source, name, digest, columns).to_dict()
    # Such a data set knows no numbers about itself; what MLflow stores of it has a place for them.
    return Dataset(**described, profile=json.dumps(redacted(profile)))


def _open_client(uri: str) -> MlflowClient:
    # Jobs must not phone home, and MLflow's default of seven retries with doubling pauses turns an
    # unreachable server into minutes of silence. All three stay the user's to set.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    if redact(uri) != uri:  # else MLflow prints it at the end of each run
        os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    for noisy in ("alembic", "mlflow.store.db.utils"):  # table creation, hundreds of lines
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if database := _sqlite_file(uri):
        database.parent.mkdir(parents=True, exist_ok=True)
    if urlparse(uri).scheme in ("http", "https"):
        if not urlparse(uri).hostname:
            raise ValueError(tracking_errors.NO_URI)
    elif uri.partition(":")[0] not in ("databricks", "file"):
        _reach_database(uri)
    from mlflow import MlflowClient  # takes seconds to import, so only where a job does track

    return MlflowClient(tracking_uri=uri)


def _reach_database(uri: str) -> None:
    """Connect once; MLflow tries for two minutes."""
    from sqlalchemy import NullPool, create_engine
    from sqlalchemy.engine import make_url

    if "://" not in uri:
        raise ValueError(tracking_errors.NO_URI)
    if make_url(uri).drivername.startswith("sqlite") and _sqlite_file(uri) is None:
        raise ValueError("it would be kept in memory and lost; use sqlite:///FILE")
    create_engine(uri, poolclass=NullPool).connect().close()


def _sqlite_file(uri: str) -> Path | None:
    prefix = "sqlite:///"
    name = uri.removeprefix(prefix).partition("?")[0]
    return Path(name).resolve() if uri.startswith(prefix) and name not in ("", ":memory:") else None
