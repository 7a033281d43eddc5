"""A workflow file: steps, what each takes from others, and their settings in full."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, field_validator

from dim.config import StrictModel, load_config, read_yaml, shipped, suggestion, validate_config
from dim.errors import ConfigError
from infra.cost import Prices
from infra.storage import is_local, join, local_path
from infra.tracking import default_uri
from workflows.programs import MODULES, program
from workflows.programs.program import Program

_REFERENCE = re.compile(r"\$\{([^${}]*)\}")
_NAME = re.compile(r"[a-z][a-z0-9_-]*")


class StepConfig(StrictModel):
    """One step as its file says it."""

    run: str
    """The program: ``ingest``, ``edit``, ``train`` and so on."""
    file: str | None = None
    """Its settings, a YAML file beside the workflow's."""
    settings: dict[str, Any] = Field(default_factory=dict, alias="with")
    """Settings on top of it. ``${NAME}`` is where the step NAME leaves what it makes."""
    after: tuple[str, ...] = ()
    """Steps that must be done before, besides those that its settings name."""

    @field_validator("run")
    @classmethod
    def _known(cls, run: str) -> str:
        if run not in MODULES:
            hint = suggestion(run, MODULES)
            raise ValueError(f"no program {run!r}{hint}; there are {', '.join(MODULES)}")
        return run


class WorkflowTracking(StrictModel):
    """Where all steps log; without ``uri``: MLFLOW_TRACKING_URI, else a file in ``out``."""

    uri: str | None = None
    experiment: str = "dim"
    prices: Prices = Field(default_factory=dict)
    """US dollars an hour of what a cluster has, see :mod:`infra.cost`; else no cost is told."""


class WorkflowConfig(StrictModel):
    """A workflow file."""

    out: str
    """Address of the folder below which every step has a folder of its own."""
    values: dict[str, Any] = Field(default_factory=dict)
    """What several steps share: ``${values.NAME}`` in their settings."""
    tracking: WorkflowTracking = WorkflowTracking()
    """Each step's MLflow run is a child of the workflow's."""
    parallel: PositiveInt = 2
    """Steps at a time, at most."""
    steps: dict[str, StepConfig] = Field(min_length=1)

    @field_validator("steps")
    @classmethod
    def _named(cls, steps: dict[str, StepConfig]) -> dict[str, StepConfig]:
        for name in steps:
            if not _NAME.fullmatch(name) or name in ("values", "out", "here"):
                raise ValueError(
                    f"a step cannot be called {name!r}: small letters, digits, - and _, and none "
                    "of values, out, here"
                )
        return steps


@dataclass(frozen=True)
class Step:
    """A step that could be run as it is.

    Attributes:
        name: as its file calls it.
        program: what it runs.
        config: its settings, checked.
        inputs: the steps that must be done before it.
        out: address of its own folder.
    """

    name: str
    program: Program
    config: StrictModel
    inputs: tuple[str, ...]
    out: str


@dataclass(frozen=True)
class Workflow:
    """A workflow with every step's settings resolved, in an order in which they could be run."""

    config: WorkflowConfig
    tracking: WorkflowTracking
    steps: Mapping[str, Step]

    def following(self, name: str) -> set[str]:
        """The steps that take, directly or not, what ``name`` makes."""
        found: set[str] = set()
        for step in self.steps.values():  # each stands behind its inputs
            if name in step.inputs or found & set(step.inputs):
                found.add(step.name)
        return found


def load_workflow(path: str | Path, overrides: Sequence[str] = ()) -> Workflow:
    """Read a workflow file and check the settings of all its steps.

    Args:
        path: of the file.
        overrides: ``key.sub=value``; what begins with no key of the file is one of its ``values``.

    Raises:
        ConfigError: what is wrong, in which step and at which key.
    """
    path = Path(shipped(str(path)))
    known = set(WorkflowConfig.model_fields)
    given = [
        each if each.partition("=")[0].partition(".")[0] in known else f"values.{each}"
        for each in overrides
    ]
    config = load_config(WorkflowConfig, path, given)
    _check_values(config, overrides, path)
    if is_local(config.out):
        config = config.model_copy(update={"out": str(Path(local_path(config.out)).resolve())})
    order = _order(config, path)
    tracking = config.tracking
    if tracking.uri is None:
        tracking = tracking.model_copy(update={"uri": default_uri(config.out)})
    steps = {name: _resolved(name, config, tracking, path) for name in order}
    return Workflow(config, tracking, steps)


def programs_of(path: str | Path) -> set[str]:
    """The programs that a workflow file's steps run, without reading their settings.

    Raises:
        ConfigError: the file cannot be read.
    """
    steps = read_yaml(Path(shipped(str(path)))).get("steps")
    named = steps.values() if isinstance(steps, dict) else ()
    runs = [step.get("run") for step in named if isinstance(step, dict)]
    return {name for name in MODULES if name in runs}


def place(config: WorkflowConfig, name: str) -> str:
    """The folder of the step ``name``."""
    return join(config.out, program(config.steps[name].run).folder, name)


def _check_values(config: WorkflowConfig, overrides: Sequence[str], path: Path) -> None:
    """An override is for a value that the file has: one of a new name would change nothing."""
    in_file = read_yaml(path).get("values") or {}
    for name in config.values:
        if name not in in_file:
            hint = suggestion(name, [*in_file, *WorkflowConfig.model_fields])
            raise ConfigError(f"{path}: it has no value {name!r}{hint}")


def _order(config: WorkflowConfig, path: Path) -> list[str]:
    before = {name: _inputs(name, config, path) for name in config.steps}
    try:
        return list(TopologicalSorter(before).static_order())
    except CycleError as error:
        circle = " < ".join(error.args[1])
        raise ConfigError(f"{path}: steps wait for one another: {circle}") from None


def _inputs(name: str, config: WorkflowConfig, path: Path) -> list[str]:
    step = config.steps[name]
    named = [found.partition(".")[0] for found in _references(step.settings)]
    inputs = [each for each in named if each not in ("values", "out", "here")] + list(step.after)
    for each in inputs:
        if each not in config.steps:
            hint = suggestion(each, config.steps)
            raise ConfigError(f"{path}: step {name!r} needs {each!r}, which is no step{hint}")
    return list(dict.fromkeys(inputs))


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield from _REFERENCE.findall(value)
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _references(each)
    elif isinstance(value, list):
        for each in value:
            yield from _references(each)


def _resolved(name: str, config: WorkflowConfig, tracking: WorkflowTracking, path: Path) -> Step:
    step = config.steps[name]
    runs, out, where = program(step.run), place(config, name), f"{path}, step {name!r}"
    file = None if step.file is None else path.parent / step.file
    values = {} if file is None else read_yaml(file)
    values = _merged(values, _filled(step.settings, config, path, where))
    fields = runs.config.model_fields
    if "out" in fields:
        values["out"] = out
    if "tracking" in fields and not values.get("tracking"):
        values["tracking"] = tracking.model_dump()
    checked = validate_config(runs.config, values, where=where)
    return Step(name, runs, checked, tuple(_inputs(name, config, path)), out)


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """``below`` with what ``above`` says; sections are merged, all else is replaced."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _filled(value: Any, config: WorkflowConfig, path: Path, where: str) -> Any:
    if isinstance(value, Mapping):
        return {key: _filled(each, config, path, where) for key, each in value.items()}
    if isinstance(value, list):
        return [_filled(each, config, path, where) for each in value]
    if not isinstance(value, str):
        return value
    if whole := _REFERENCE.fullmatch(value):
        return _looked_up(whole[1], config, path, where)
    return _REFERENCE.sub(lambda found: _text(_looked_up(found[1], config, path, where)), value)


def _looked_up(reference: str, config: WorkflowConfig, path: Path, where: str) -> Any:
    name, _, part = reference.partition(".")
    if name == "here":
        return str(path.parent.resolve())
    if name == "out":
        return config.out
    if name == "values":
        if part not in config.values:
            raise ConfigError(f"{where}: no value {part!r}{suggestion(part, config.values)}")
        return config.values[part]
    folder, parts = place(config, name), program(config.steps[name].run).parts
    if part and part not in parts:
        has = ", ".join(parts) or "no parts"
        raise ConfigError(f"{where}: ${{{reference}}}: {name!r} has {has}{suggestion(part, parts)}")
    return join(folder, parts[part]) if part else folder


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
