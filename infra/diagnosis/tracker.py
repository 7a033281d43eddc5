"""The tracking server: whether it answers, and lets this machine in."""

from __future__ import annotations

import os
from pathlib import Path

from infra.diagnosis.finding import Finding, Status
from infra.tracking import TrackingError, call, open_client

_CHECK = "tracking"
_SQLITE = "sqlite:///"


def examine_tracker(uri: str) -> Finding:
    """Whether MLflow at ``uri`` can be read; nothing is written there."""
    database = Path(uri.removeprefix(_SQLITE))
    if uri.startswith(_SQLITE) and not database.exists():
        return Finding(_CHECK, Status.OK, f"{uri} is made by the first run")
    # By itself MLflow's client goes on asking for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    try:
        client = open_client(uri)
        call(uri, "be read", lambda: client.search_experiments(max_results=1))
    except TrackingError as error:
        advice = (
            "start it or mend MLFLOW_TRACKING_URI; where it refuses, look at "
            "MLFLOW_TRACKING_TOKEN (or _USERNAME and _PASSWORD) and its --allowed-hosts"
        )
        return Finding(_CHECK, Status.FAILED, str(error), advice)
    return Finding(_CHECK, Status.OK, uri)
