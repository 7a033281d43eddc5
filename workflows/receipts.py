"""What is known of a workflow's steps: a receipt each, beside what the steps have made."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError

from dim.config import StrictModel
from dim.errors import StorageError
from dim.redaction import redacted
from infra import processes, storage
from pipelines.outputs.manifest import differences
from workflows.workflow import Step, Workflow

FOLDER = "steps"
BEAT_S = 15.0
"""Seconds between two signs of life of who makes a step."""
_DEAD_AFTER_S = 6 * BEAT_S


class Maker(StrictModel):
    """The ``dim run`` that makes a step.

    ``process`` tells it from every other one; ``beat``: its last sign of life, seconds since 1970.
    """

    pid: int
    host: str
    process: str = ""
    beat: float

    @property
    def alive(self) -> bool:
        """Whether it may still be at work."""
        ended = processes.has_ended(self.process, self.pid)
        return not ended and time.time() - self.beat < _DEAD_AFTER_S


class Receipt(StrictModel):
    """What is known of a step.

    ``anew``: it is to be made again, whatever there is. ``inputs`` are the digests of what it took
    from other steps, ``digest`` is that of what it made. ``settings`` are those that decide it.
    """

    state: Literal["open", "running", "done", "failed"] = "open"
    anew: bool = False
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: dict[str, str] = Field(default_factory=dict)
    digest: str = ""
    said: str = ""
    result: dict[str, Any] = Field(default_factory=dict)
    usd: float = 0.0
    seconds: float = 0.0
    maker: Maker | None = None

    @property
    def key(self) -> str:
        """The same exactly when settings and inputs are."""
        return key_of(self.settings, self.inputs)


def key_of(settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """A hash of what decides a step's output."""
    text = json.dumps([settings, inputs], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


class Receipts:
    """The receipts of a workflow, below its own folder. Each is written at once and completely.

    Args:
        workflow: whose.
    """

    def __init__(self, workflow: Workflow) -> None:
        self._workflow = workflow
        self._store = storage.open_store(workflow.config.out)

    def read(self, name: str) -> Receipt:
        """The receipt of a step; an empty one where there is none.

        Raises:
            StorageError: it cannot be read.
        """
        file = f"{FOLDER}/{name}.json"
        if not self._store.is_file(file):
            return Receipt()
        try:
            return Receipt.model_validate_json(self._store.read(file))
        except ValidationError:
            raise StorageError(
                f"{self._store.address(file)} is no receipt of a step; remove it, and the step is "
                "looked at again"
            ) from None

    def write(self, name: str, receipt: Receipt) -> None:
        """Keep what is known of a step."""
        text = json.dumps(redacted(receipt.model_dump(mode="json")), indent=2)
        self._store.write(f"{FOLDER}/{name}.json", f"{text}\n".encode())

    def settings(self, step: Step) -> dict[str, Any]:
        """What decides a step, as receipts hold it."""
        deciding = step.program.deciding(step.config, self._workflow.config.out)
        settings: dict[str, Any] = redacted({"run": type(step.config).__name__, **deciding})
        return settings

    def digest(self, step: Step, receipt: Receipt) -> str | None:
        """Of what a step has made, as it lies there now."""
        return step.program.digest(step.config, receipt.result)

    def is_done(self, step: Step, inputs: Mapping[str, str]) -> bool:
        """Whether a step's output is there, and is the one of these settings and inputs."""
        receipt = self.read(step.name)
        return (
            receipt.state == "done"
            and receipt.key == key_of(self.settings(step), inputs)
            and self.digest(step, receipt) == receipt.digest
        )

    def change(self, step: Step, inputs: Mapping[str, str]) -> str | None:
        """What was otherwise when a finished step was made, in words; ``None`` if nothing was."""
        receipt = self.read(step.name)
        if receipt.state != "done" or receipt.anew:
            return None
        now = {"inputs": dict(inputs), **self.settings(step)}
        for difference in differences({"inputs": receipt.inputs, **receipt.settings}, now):
            name, _, values = difference.partition(" ")
            if name.startswith("inputs."):
                return f"what it took from {name.removeprefix('inputs.')!r} was made again since"
            return f"{name} {values}"
        return None


def maker() -> Maker:
    """This process, now."""
    pid = os.getpid()
    return Maker(
        pid=pid, host=socket.gethostname(), process=processes.identity(pid), beat=time.time()
    )
