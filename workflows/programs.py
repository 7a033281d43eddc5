"""What a step of a workflow can run: the programs that one would run by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import Field

from dim.config import StrictModel, what_decides
from dim.errors import DimError, InputError, StorageError
from infra import storage
from infra.registry import Registry
from infra.tracking import Tracking
from pipelines import edit, evaluate, features, filter, ingest, t2i
from pipelines.job import TrackingConfig
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Manifest
from training import record as records
from training import train
from training.stage import OPERATIONAL_KEYS, StageConfig
from workflows import server

Tell = Callable[[float | None, str], None]
"""Takes how much of a step is done (0 to 1, where it is known) and what it does now."""


@dataclass(frozen=True)
class Done:
    """What a step has made.

    Attributes:
        said: one line about it.
        result: what others may want to know of it, in JSON's types.
        usd: what was paid for it to others.
    """

    said: str
    result: dict[str, Any] = field(default_factory=dict)
    usd: float = 0.0


@dataclass(frozen=True)
class Program:
    """What a step runs.

    Attributes:
        config: its settings.
        folder: below the workflow's own, where its steps have theirs.
        run: makes the output in the step's own folder; ``anew``: it replaces what is there.
        digest: of a finished output, given settings and result; ``None`` where there is none.
        parts: what ``${step.PART}`` adds to a step's folder.
        how: settings that do not decide what comes out, besides those that are marked so.
        clear: removes what is there before a step is made anew whose ``run`` does not replace it.
        stays: it goes on when the workflow has ended, so it has no part in the workflow's Ray.
    """

    config: type[StrictModel]
    folder: str
    run: Callable[[Any, str, bool, Tell], Done]
    digest: Callable[[Any, Mapping[str, Any]], str | None]
    parts: Mapping[str, str] = field(default_factory=dict)
    how: frozenset[str] = frozenset()
    clear: Callable[[Any, Mapping[str, Any]], None] | None = None
    stays: bool = False

    def deciding(self, config: StrictModel, out: str) -> dict[str, Any]:
        """The settings that decide what comes out, without where in the workflow things lie.

        Args:
            config: of this program.
            out: the workflow's own folder.
        """
        values = what_decides(self.config, config.model_dump(mode="json"))
        kept = {key: value for key, value in values.items() if key not in self.how}
        return {key: _moved(value, out) for key, value in kept.items() if key != "out"}


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


class EvaluateStepConfig(evaluate.EvaluateConfig):
    """An evaluation that is logged."""

    tracking: TrackingConfig | None = None


def _job(module: Any) -> Callable[[Any, str, bool, Tell], Done]:
    def run(config: Any, out: str, anew: bool, tell: Tell) -> Done:
        def on_progress(done: int, ranges: int) -> None:
            tell(done / ranges, f"{done} of {ranges} ranges")

        manifest: Manifest = module.run(config, overwrite=anew, on_progress=on_progress)
        usd = (manifest.cost or {}).get("usd", 0.0)
        return Done(manifest.counts.in_words(), manifest.counts.model_dump(), usd)

    return run


def _of_manifest(config: Any, result: Mapping[str, Any]) -> str | None:
    return _hash(config.out, manifests.NAME)


def _train(config: StageConfig, out: str, anew: bool, tell: Tell) -> Done:
    def on_progress(lines: Any, metrics: Mapping[str, float]) -> None:
        for line in lines:
            print(line, flush=True)
        if "progress" in metrics:
            rate = metrics["samples_per_second"]
            tell(metrics["progress"], f"loss {metrics['loss']:.4f} · {rate:.0f} samples/s")
        elif "features_done" in metrics:
            tell(metrics["features_done"], "computing features")

    made = train.run(config, on_progress=on_progress)
    said = f"loss {made.metrics['loss']:.4f}"
    if "validation_exact" in made.metrics:
        said += f", {made.metrics['validation_exact']:.0%} of validation exact"
    result = {"model": made.model_dir, "checkpoint": made.checkpoint, "metrics": made.metrics,
              "run_id": made.mlflow_run_id, "registered": made.registered}  # fmt: skip
    return Done(said, result)


def _discard(config: StageConfig, result: Mapping[str, Any]) -> None:
    records.discard(config.out)


def _of_stage(config: StageConfig, result: Mapping[str, Any]) -> str | None:
    record = records.read_record(config.out)
    return _hash(config.out, records.STAGE_FILE) if record and record.finished else None


def _evaluate(config: EvaluateStepConfig, out: str, anew: bool, tell: Tell) -> Done:
    evaluation = evaluate.run(config, overwrite=anew)
    numbers = evaluation.metrics()
    if config.tracking is not None and config.tracking.uri is not None:
        tracking = Tracking(config.tracking.uri, config.tracking.experiment)
        with tracking.run("evaluate", {"model": config.model, "data": config.data}) as run:
            run.log_metrics(numbers)
    exact = ", ".join(f"{numbers[f'exact/{way}']:.0%} {evaluate.NAMES[way]}"
                      for way in evaluation.ways)  # fmt: skip
    return Done(f"exact: {exact}", {"metrics": numbers})


def _of_evaluation(config: EvaluateStepConfig, result: Mapping[str, Any]) -> str | None:
    return _hash(str(config.out), evaluate.NUMBERS_FILE)


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


def _serve(config: server.ServeStepConfig, out: str, anew: bool, tell: Tell) -> Done:
    started = server.start(config, out)
    return Done(f"{started['url']}/", started)


def _hash(out: str, name: str) -> str | None:
    store = storage.open_store(out)
    try:
        return hashlib.sha256(store.read(name)).hexdigest() if store.is_file(name) else None
    except StorageError:
        return None


def _moved(value: Any, out: str) -> Any:
    if isinstance(value, dict):
        return {key: _moved(each, out) for key, each in value.items()}
    if isinstance(value, list):
        return [_moved(each, out) for each in value]
    within = isinstance(value, str) and value.startswith(f"{out}/")
    return f"${{out}}{value.removeprefix(out)}" if within else value


def _data(config: type[StrictModel], module: Any) -> Program:
    return Program(config, "data", _job(module), _of_manifest)


PROGRAMS: dict[str, Program] = {
    "ingest": _data(ingest.IngestConfig, ingest),
    "filter-pairs": _data(filter.FilterPairsConfig, filter),
    "filter-images": _data(filter.FilterImagesConfig, filter),
    "edit": _data(edit.EditConfig, edit),
    "t2i": _data(t2i.T2IConfig, t2i),
    "features": _data(features.FeaturesConfig, features),
    "train": Program(
        StageConfig, "training", _train, _of_stage,
        parts={"model": records.MODEL_FOLDER, "adapter": records.ADAPTER_FOLDER},
        how=OPERATIONAL_KEYS, clear=_discard,
    ),
    "evaluate": Program(
        EvaluateStepConfig, "evaluation", _evaluate, _of_evaluation,
        how=frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "batch_size",
                       "nodes_wait_s", "tracking"}),
    ),
    "register": Program(
        RegisterConfig, "registered", _register, _of_alias, how=frozenset({"tracking"})
    ),
    "serve": Program(
        server.ServeStepConfig, "serving", _serve, server.answering,
        how=frozenset({"port"}), clear=server.stop, stays=True,
    ),
}  # fmt: skip
