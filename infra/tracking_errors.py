"""What MLflow's errors mean, and what to do about them."""

from __future__ import annotations

import re
from pathlib import Path

_ELSEWHERE = "or set tracking.uri (or MLFLOW_TRACKING_URI) to where it is"
NO_URI = "not a tracking URI; use sqlite:///FILE, http(s)://HOST:PORT or a database URI"
_FORBIDDEN = (
    "this user may not do that: ask for the permission to edit the experiment, or choose another "
    "one: tracking.experiment=NAME"
)
_NO_SERVER = f"what answers there is no MLflow server; start one, {_ELSEWHERE}"

# The first pattern that is found says what it is; ``{0}`` is its first group.
_MEANINGS = tuple(
    (re.compile(pattern, re.IGNORECASE | re.DOTALL), meaning)
    for pattern, meaning in (
        # the server
        (r"error code 401|UNAUTHENTICATED",
         "it wants a user: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
         "MLFLOW_TRACKING_TOKEN"),
        (r"error code 403|PERMISSION_DENIED", _FORBIDDEN),
        (r"error code (?:3\d\d|404|405)|ENDPOINT_NOT_FOUND|not in a valid JSON format", _NO_SERVER),
        (r"CERTIFICATE_VERIFY_FAILED|SSLError",
         "its certificate is not trusted here: check whether it is https at all, and set "
         "MLFLOW_TRACKING_SERVER_CERT_PATH to the one that signed it"),
        (r"too many (\d+) error responses",
         f"it answers HTTP {{0}}; see to the server, {_ELSEWHERE}"),
        (r"Failed to resolve|Name or service not known|name resolution|could not translate host",
         f"the host is not known; correct it, {_ELSEWHERE}"),
        (r"Connection refused|actively refused|Can't connect to .*server",
         f"nothing listens there; start it, {_ELSEWHERE}"),
        (r"Max retries exceeded|timed? ?out|Connection aborted|Connection reset|unreachable",
         f"it does not answer; start it, {_ELSEWHERE}"),
        # the database
        (r"No module named '([\w.]+)'",
         "the Python module {0} that this kind of database needs is not installed: pip install it"),
        (r"file is not a database|file is encrypted",
         "that file is no SQLite database; name another one in tracking.uri"),
        (r"database is locked",
         "another program holds the database; wait for it, or let both log to an MLflow server"),
        (r"unable to open database file|readonly database",
         "that file cannot be opened for writing: see to its folder and permissions, or name "
         "another one in tracking.uri"),
        (r"password authentication failed|Access denied for user|role .* does not exist|pg_hba",
         "the database does not let this user in: check user and password in tracking.uri"),
        (r"database .* does not exist|Unknown database",
         "that server has no such database: create it, or name another one in tracking.uri"),
        (r"in maintenance mode",
         "folders are no store of MLflow any more: use sqlite:///FILE, and `mlflow "
         "migrate-filestore` to take over what is there"),
        (r"got unsupported URI|Invalid SQLite URL|Invalid IPv6 URL|Could not parse SQLAlchemy|"
         r"Can't load plugin", NO_URI),
        # what was deleted in the UI
        (r"Run with id=?\s?(\w+) not found|Run '(\w+)' not found",
         "there is no such run; log to where it began (tracking.uri), or begin anew with --fresh"),
        (r"The run (\w+) must be in the 'active' state",
         "the run {0} was deleted; restore it with 'mlflow runs restore --run-id {0}'"),
    )
)  # fmt: skip


def deleted_experiment(name: str, experiment_id: str, uri: str) -> str:
    """Why nothing can be logged to an experiment of that name, and both ways out."""
    return (
        f"the experiment {name!r} was deleted there; restore it with 'MLFLOW_TRACKING_URI={uri} "
        f"mlflow experiments restore --experiment-id {experiment_id}', or choose another name: "
        "tracking.experiment=NAME"
    )


def deleted_run(run_id: str) -> str:
    """Why a run cannot go on, and both ways out."""
    return (
        f"the run {run_id} was deleted there; restore it with 'mlflow runs restore --run-id "
        f"{run_id}', or begin anew with --fresh"
    )


def explain(error: Exception, experiment: str, uri: str) -> str:
    """One sentence on an error of the MLflow at ``uri``, or of its database."""
    text = " ".join(str(error).split())
    if found := re.search(r"The experiment (\d+) must be in the 'active' state", text):
        return deleted_experiment(experiment, found[1], uri)
    kind = getattr(error, "error_code", "")
    if found := re.search(r"out-of-date database schema \(found version (\w+)", text):
        return _of_other_schema(found[1])
    for pattern, meaning in _MEANINGS:
        if found := pattern.search(f"{kind} {text}"):
            return meaning.format(*found.groups())
    return text.split(" (Background on this error")[0] or type(error).__name__


def explain_file(error: Exception, place: str) -> str:
    """The same for what keeps a file from being stored at ``place``, where the experiment's lie."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ImportError):
        text = f"this kind of store needs a Python package that is not installed ({text})"
    elif "tracking URI must be a valid http" in text:
        text = "only through the server that made the experiment, not beside it"
    elif place.startswith(("/", "file:")):
        text = f"{text}; the path must mean the same on every machine that logs"
    return (
        f"its files go to {place}, where they cannot be written ({text}); mend that, or choose "
        "another experiment: tracking.experiment=NAME"
    )


def _of_other_schema(version: str) -> str:
    import mlflow

    here = Path(mlflow.__file__).parent / "store" / "db_migrations" / "versions"
    if any(here.glob(f"{version}_*.py")):
        return (
            "its database is of an older MLflow: make a copy of it, then run 'mlflow db upgrade' "
            "with the same URI"
        )
    return (
        f"its database is of a newer MLflow than {mlflow.__version__}, which is here: install that "
        "version, or log to another database"
    )
