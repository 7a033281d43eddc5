"""A trained model gets the name by which it is served, if it is good enough."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from dim.config import StrictModel
from dim.errors import DimError, InputError
from infra.registry import Registry
from pipelines import evaluate
from pipelines.job import TrackingConfig
from training import record as records
from workflows.programs.program import Done, Program, Tell


class RegisterConfig(StrictModel):
    """Which model gets which alias, and what it has to reach."""

    stage: str
    """Folder of a training step; its model is registered already, as a version."""
    alias: str
    """What ``models:/NAME@ALIAS`` is to lead to it."""
    evaluation: str | None = None
    """Folder of an evaluation of it."""
    at_least: dict[str, float] = Field(default_factory=dict)
    """What its numbers must reach, such as ``exact/blueprint: 0.5``; else the alias stays."""
    tracking: TrackingConfig | None = None


def _register(config: RegisterConfig, out: str, anew: bool, tell: Tell) -> Done:
    record = records.read_record(config.stage)
    if record is None or not record.registered:
        raise InputError(
            f"{config.stage} has no registered model: set `registry` in the stage's settings"
        )
    numbers = _numbers(config)
    for name, least in config.at_least.items():
        if name not in numbers:
            raise InputError(f"at_least: the evaluation has no {name}; it has {', '.join(numbers)}")
        if numbers[name] < least:
            raise DimError(
                f"{name} is {numbers[name]:.3f} and must be {least:g} at least: "
                f"{config.alias} stays with the model that has it"
            )
    name, _, version = record.registered.removeprefix("models:/").rpartition("/")
    registry = Registry(_uri(config))
    registry.point(config.alias, registry.version(name, int(version)))
    return Done(f"models:/{name}@{config.alias} is version {version}", {"uri": record.registered})


def _of_alias(config: RegisterConfig, result: Mapping[str, Any]) -> str | None:
    name, _, version = str(result.get("uri", "")).removeprefix("models:/").rpartition("/")
    if not version:
        return None
    found = Registry(_uri(config)).find(name, config.alias)
    return version if found is not None and str(found.version) == version else None


def _numbers(config: RegisterConfig) -> dict[str, float]:
    if config.evaluation is None:
        return {}
    values: dict[str, float] = evaluate.read_numbers(config.evaluation)
    return values


def _uri(config: RegisterConfig) -> str:
    if config.tracking is None or config.tracking.uri is None:
        raise InputError("tracking.uri: in which MLflow?")
    return config.tracking.uri


PROGRAMS = {
    "register": Program(
        RegisterConfig, "registered", _register, _of_alias, how=frozenset({"tracking"})
    )
}
