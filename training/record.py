"""A stage's output: its parts, and ``stage.json``: what was trained there, how far, what came out.

The record is written before the first step and again at the end. From it a second call knows
whether to go on, to hand back what is there, or to refuse because something else was trained there.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dim.config import dump_config, what_decides
from dim.errors import ConfigError
from dim.redaction import redacted
from infra import samples, storage
from infra.fingerprint import fingerprint
from training.shapes import SHAPES_FILE
from training.stage import CHANGEABLE_KEYS, OPERATIONAL_KEYS, StageConfig

STAGE_FILE = "stage.json"
MODEL_FOLDER = "model"  # what ``dim.model.load`` reads
ADAPTER_FOLDER = "adapter"  # instead of it, where a LoRA was trained: see ``dim.model.lora``
CHECKPOINTS_FOLDER = "checkpoints"  # Ray Train's
_VERSION = 1


@dataclass(frozen=True)
class StageRecord:
    """``identity`` is what may not change when the run goes on, by configuration key.

    ``events`` are changes of the learning rate, and returns to a checkpoint (see
    ``training.state``).
    """

    identity: dict[str, Any]
    config: dict[str, Any]
    run_id: str
    finished: bool = False
    metrics: dict[str, float] = field(default_factory=dict)
    checkpoint: str = ""
    registered: str = ""  # as ``models:/NAME/VERSION``
    events: list[dict[str, float]] = field(default_factory=list)
    version: int = _VERSION

    def write(self, out: str) -> None:
        """Put the record into ``out``, atomically."""
        text = json.dumps(redacted(asdict(self)), indent=2, sort_keys=True)
        storage.open_store(out).write(STAGE_FILE, text.encode())

    def check_same(self, identity: Mapping[str, Any], out: str) -> None:
        """Refuse to mix two runs. An unfinished one may go on with another learning rate.

        Raises:
            ConfigError: ``out`` belongs to a run that differs; the message names the keys.
        """
        # A setting that is newer than the record had its default.
        before = what_decides(StageConfig, self.identity)
        identity = what_decides(StageConfig, redacted(identity))
        names = sorted(before.keys() | identity.keys())
        if not self.finished:
            names = [name for name in names if name not in CHANGEABLE_KEYS]
        differing = [name for name in names if before.get(name) != identity.get(name)]
        if differing:
            state = "a finished" if self.finished else "an unfinished"
            raise ConfigError(
                f"{out} holds {state} run with other settings ({', '.join(differing)}): choose "
                "another out, or --fresh to discard it"
            )

    def changes(self, identity: Mapping[str, Any]) -> list[dict[str, float]]:
        """The events that a run brings which goes on as ``identity``."""
        return [
            {key: identity[key], "before": self.identity[key]}
            for key in sorted(CHANGEABLE_KEYS)
            if identity[key] != self.identity[key]
        ]

    def with_events(self, told: Sequence[dict[str, float]]) -> StageRecord:
        """The record with what the workers told, beside what an earlier part of the run had told.

        They know the step of each event, so a change that was noted without one is left out then.
        """
        if not told:
            return self
        before = [event for event in self.events if "step" in event and event not in told]
        return replace(self, events=[*before, *told])


def read_record(out: str) -> StageRecord | None:
    """The record in ``out``, or ``None``.

    Raises:
        ConfigError: there is a file of that name that is no such record.
    """
    store = storage.open_store(out)
    if not store.exists(STAGE_FILE):
        return None
    path = store.address(STAGE_FILE)
    try:
        record = StageRecord(**json.loads(store.read(STAGE_FILE)))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} is not the record of a training stage: {error}") from None
    if record.version != _VERSION:
        raise ConfigError(f"{path} was written by another version; --fresh discards that run")
    return record


def discard(out: str) -> None:
    """Remove all that a stage has left in ``out``."""
    store = storage.open_store(out)
    for name in (CHECKPOINTS_FOLDER, MODEL_FOLDER, ADAPTER_FOLDER, SHAPES_FILE, STAGE_FILE):
        store.delete(name)
    discard_partial(out)


def discard_partial(out: str) -> None:
    """Remove what exports that were cut off have left beside the folders of a local ``out``.

    Their names begin with a dot; only the owner of ``out`` may call this.
    """
    if storage.is_local(out):
        for left in Path(storage.local_path(out)).glob(f".{MODEL_FOLDER}-*"):
            shutil.rmtree(left, ignore_errors=True)


def identify(config: StageConfig, steps: int) -> dict[str, Any]:
    """What decides the trained weights: settings, contents of the data, contents of ``init``."""
    values = {k: v for k, v in dump_config(config).items() if k not in OPERATIONAL_KEYS}
    for key in ("steps", "epochs"):
        values.pop(key)
    if any(source.changes_the_mixture for source in config.data):
        # Neither an address nor a name moves a weight; of the contents ``data`` speaks.
        values["mixture"] = [
            {"weight": source.weight, "repeats": source.repeats or 1, "cap": source.cap}
            for source in config.data
        ]
    return {
        **values,
        "steps": steps,
        "data": samples.fingerprint(config.uris),
        "init": fingerprint(config.init),
    }
