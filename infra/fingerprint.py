"""Whether a model folder holds what it held before."""

from __future__ import annotations

from dim.model.checkpoint import content
from infra import storage


def fingerprint(address: str) -> str:
    """A hash of a model folder or model YAML. Of large files only both ends are read."""
    store = storage.open_store(address)
    return content.digest([("", 0)] if store.is_file() else store.list(), store.open_input)
