"""``dim train``: one training stage on Ray Train."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import ray
import typer
from ray.exceptions import RayActorError
from ray.train import (
    FailureConfig,
    LoggingConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
)
from ray.train.torch import TorchConfig, TorchTrainer
from rich.console import Console

from dim.config import dump_config, load_config
from dim.errors import DimError, InputError
from dim.failures import explain, find_dim_error
from dim.gpus import GPUS
from infra import storage, tracing
from infra.capacity import Demand
from infra.cost import counted_cost
from infra.logs import ray_logging
from infra.ray_cluster import join
from infra.registry import located
from infra.samples import extent, fingerprint
from infra.tracking import Run, Tracking, default_uri
from training.estimate import MFU, Wanted
from training.estimate import plan as make_plan
from training.loop import train_loop_per_worker
from training.mixture import count_sources
from training.notices import CatchSigterm
from training.owner import Fence, owning
from training.plan import Plan, absolute, measure
from training.progress import OnProgress, progress_bar, watch
from training.record import (
    ADAPTER_FOLDER,
    CHECKPOINTS_FOLDER,
    MODEL_FOLDER,
    StageRecord,
    discard,
    identify,
    read_record,
)
from training.registry import register
from training.shapes import RowShapes, find_shapes
from training.stage import StageConfig
from training.waiting import EndHopelessWait


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    ``model_dir`` is a folder for ``dim.model.load``; of a stage with ``lora``, the adapter's, which
    ``load`` takes beside the folder that the stage began with.
    """

    model_dir: str
    checkpoint: str
    metrics: dict[str, float]
    mlflow_run_id: str
    registered: str
    """``models:/NAME/VERSION``; empty where it was not to be, or could not be, registered."""


class TrainingError(DimError):
    """The workers failed more often than ``max_failures`` allows."""


def run(
    config: StageConfig, *, fresh: bool = False, on_progress: OnProgress | None = None
) -> StageResult:
    """Train a stage, or go on with it, or hand back what an earlier call finished.

    Args:
        config: The stage.
        fresh: Discard what an earlier run left in ``out``, unless another driver trains there.
        on_progress: Called with the lines that rank 0 has said since the last call and the latest
            metrics: ``progress`` (0 to 1), ``loss``, ``samples_per_second``, …,
            and before the first step ``features_done`` (0 to 1).

    Raises:
        DimError: configuration, data, model, tracker or storage are not as they must be (before
            the first step), another driver trains into ``out``, the training diverged, or workers
            failed too often.
    """
    config = absolute(_with_init_found(config))
    shapes = find_shapes(config, fresh=fresh)
    steps, rows = measure(config, shapes)
    identity = identify(config, steps)
    if not fresh and (done := _finished(config, identity)) is not None:
        return done
    with owning(
        config.out,
        wait_s=config.owner_wait_s,
        timeout_s=config.owner_timeout_s,
        say=lambda line: _say(line, on_progress),
    ) as lease:
        if fresh:
            discard(config.out)
        elif (done := _finished(config, identity)) is not None:  # by a driver that was waited for
            return done
        with tracing.here().span(f"train {config.stage}", output=config.out):
            return _train(config, identity, steps, rows, shapes, lease.owner.token, on_progress)


def _finished(config: StageConfig, identity: Mapping[str, Any]) -> StageResult | None:
    """What an earlier call finished in ``out``.

    Raises:
        ConfigError: a run that differs is there.
    """
    earlier = read_record(config.out)
    if earlier is None:
        return None
    earlier.check_same(identity, config.out)
    return _result(config, _registered(config, earlier)) if earlier.finished else None


def _train(
    config: StageConfig,
    identity: dict[str, Any],
    steps: int,
    rows: int,
    shapes: RowShapes | None,
    token: str,
    on_progress: OnProgress | None,
) -> StageResult:
    """Begin or go on, in an output that is this driver's by ``token``."""
    earlier = read_record(config.out)
    uri = config.tracking.uri or default_uri(config.out)
    tracking = Tracking(uri, config.tracking.experiment)
    settings = dump_config(config)
    with (
        ray_session(config),
        tracking.run(
            config.stage,
            settings,
            {"stage": config.stage, "init": config.init},
            run_id=earlier.run_id if earlier else None,
        ) as mlflow_run,
        counted_cost(mlflow_run, config.tracking.prices),
    ):
        events = [*earlier.events, *earlier.changes(identity)] if earlier else []
        record = StageRecord(identity, settings, mlflow_run.id, events=events)
        record.write(config.out)
        if shapes is not None:
            shapes.write(config.out)
        mlflow_run.log_dict(settings, "stage.json")  # also proves that artifacts can be stored
        log_inputs(mlflow_run, config)
        plan = Plan(
            config=config,
            steps=steps,
            rows=rows,
            sources=count_sources(config),
            shapes=None if shapes is None else shapes.told(),
            tracking_uri=uri,
            run_id=mlflow_run.id,
            owner=token,
            trace=tracing.here(),
        )
        with watch(mlflow_run.id, on_progress):
            record = _fit(plan, record)
    _write(record, plan)
    return _result(config, _registered(config, record))


def make_trainer(plan: Plan) -> TorchTrainer:
    """The Ray Train job of a stage."""
    config = plan.config
    store = storage.open_store(config.out)
    # Ray's type hints are those of its former Train; what runs is the one after it.
    return TorchTrainer(
        train_loop_per_worker,  # type: ignore[arg-type]
        train_loop_config=dump_config(plan),
        torch_config=TorchConfig(timeout_s=config.collective_timeout_s),
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=config.workers,  # type: ignore[arg-type]
            elastic_resize_monitor_interval_s=config.resize_interval_s,
            use_gpu=config.use_gpu,
            resources_per_worker=dict(_demand(config).each),
        ),
        run_config=RunConfig(  # type: ignore[call-arg]
            name=CHECKPOINTS_FOLDER,
            storage_path=store.root,
            storage_filesystem=store.filesystem,
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=[
                CatchSigterm(),  # type: ignore[list-item]
                EndHopelessWait(_demand(config), config.nodes_wait_s),  # type: ignore[list-item]
            ],
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _demand(config: StageConfig) -> Demand:
    gpu = {"GPU": 1} if config.use_gpu else {}
    fewest, most = config.worker_range
    return Demand(f"stage {config.stage}", fewest, {"CPU": config.cpus_per_worker, **gpu}, most)


def main(
    stage: Annotated[Path, typer.Argument(help="A stage file, such as configs/tiny-t2i.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of the file to change: key.sub=value.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Discard what an earlier run left in the output.")
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what it takes of GPUs and time, and start nothing.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(help=f"With --plan: on which GPU ({', '.join(GPUS)}).")
    ] = None,
    price: Annotated[
        float | None, typer.Option(min=0, help="With --plan: dollars a GPU and hour.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(min=0.01, max=1, help=f"With --plan: share of the GPU's peak; {MFU} if not."),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="With --plan: of data that are not there yet.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="With --plan: model YAML for an init that is not there yet.")
    ] = None,
) -> None:
    """Train one stage from a YAML file.

    An interrupted run goes on where its last checkpoint stands; a finished one is not run again.
    """
    config = load_config(StageConfig, stage, overrides or [])
    console = Console()
    given = {"gpu": gpu, "price": price, "mfu": mfu, "samples": samples, "model": model}
    if plan:
        if fresh:
            raise InputError("--plan starts nothing, so there is nothing for --fresh to discard")
        wanted = Wanted(gpu, price, MFU if mfu is None else mfu, samples, model)
        console.print(make_plan(_with_init_found(config), wanted))
        return
    for name, value in given.items():
        if value is not None:
            raise InputError(f"--{name} goes with --plan")
    with progress_bar(console, config.stage) as on_progress:
        result = run(config, fresh=fresh, on_progress=on_progress)
    for name, value in result.metrics.items():
        if name == "loss" or name.startswith("validation_"):
            console.print(f"{name}: {value:.4g}")
    made = "model" if config.lora is None else "LoRA adapter"
    console.print(f"{made}: {result.model_dir}", soft_wrap=True)
    console.print(f"MLflow run: {result.mlflow_run_id}")
    if result.registered:
        console.print(f"registered: {result.registered} (models:/NAME@{config.stage})")


def log_inputs(run: Run, config: StageConfig) -> None:
    """Record with MLflow what is trained on: each data set's address, size, digest and part."""
    for name, source in zip(config.source_names, config.data, strict=True):
        parts = {"weight": source.weight, "repeats": source.repeats, "cap": source.cap}
        given = {key: value for key, value in parts.items() if value is not None}
        run.log_dataset(
            config.stage,
            source.uri,
            fingerprint([source.uri])[:36],
            context="training",
            profile=extent(source.uri),
            tags={"name": name, **given},
        )


def _write(record: StageRecord, plan: Plan) -> None:
    """Put the record into the output, which is still this driver's.

    Raises:
        LostOutputError: it is not.
    """
    Fence(plan.config.out, plan.owner).confirm()
    record.write(plan.config.out)


def _say(line: str, on_progress: OnProgress | None) -> None:
    if on_progress is not None:
        on_progress([line], {})
    else:
        Console(stderr=True, soft_wrap=True).print(line, markup=False)


def _with_init_found(config: StageConfig) -> StageConfig:
    """With ``init: models:/…`` as the folder that it leads to."""
    return config.model_copy(update={"init": located(config.init, config.tracking.uri)})


def _registered(config: StageConfig, record: StageRecord) -> StageRecord:
    """The record of a finished stage, registered if that is still to be done.

    The model stands without it, so what goes wrong here is said, and done by the next call.
    """
    if record.registered or config.registry is None or config.lora is not None:
        return record
    try:
        uri = config.tracking.uri or default_uri(config.out)
        made = register(config, record, config.registry, uri)
    except DimError as error:
        Console(stderr=True, soft_wrap=True).print(f"warning: not registered: {error}")
        return record
    record = replace(record, registered=made.uri)
    record.write(config.out)
    return record


@contextmanager
def ray_session(config: StageConfig) -> Iterator[None]:
    """Ray is there inside: the caller's, the cluster in RAY_ADDRESS, or one on this machine.

    Raises:
        TrainingError: the cluster cannot be reached, or none can be started here.
    """
    if ray.is_initialized():
        yield
        return
    _start_ray(config)
    try:
        yield
    finally:
        ray.shutdown()


def _start_ray(config: StageConfig) -> None:
    address = os.environ.get("RAY_ADDRESS", "local")
    _, most = config.worker_range
    cpus = max(most * config.cpus_per_worker, os.cpu_count() or 1)
    structured = ray_logging()
    try:
        if address == "local":
            # What the workers say comes through on_progress; Ray's own lines stay in its log files.
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=False,
                log_to_driver=False,
                logging_config=structured,
            )
        else:
            join(logging_config=structured)
    except Exception as error:  # Ray raises bare exceptions and its many own ones here
        raise TrainingError(f"Ray at {address} did not start: {explain(error).sentence}") from error


def _fit(plan: Plan, record: StageRecord) -> StageRecord:
    """Run the trainer; its outcome as the finished record, its troubles as one sentence."""
    try:
        with _restored_sigint():
            result = make_trainer(plan).fit()
    except TrainingFailedError as error:
        if (known := find_dim_error(error)) is not None:
            raise known from error
        raise TrainingError(
            f"stage {plan.config.stage} failed after {plan.config.max_failures} restarts: "
            f"{explain(error).sentence}"
        ) from error
    except RayActorError as error:
        raise TrainingError(
            f"stage {plan.config.stage}: Ray Train's controller died: {explain(error).sentence}"
        ) from error
    outcome = result.return_value  # type: ignore[attr-defined]
    record = record.with_events(outcome["events"])
    if outcome["error"] is not None:
        _write(record, plan)
        raise outcome["error"]
    last = outcome["checkpoint"]
    return replace(record, finished=True, metrics=outcome["metrics"], checkpoint=last)


@contextmanager
def _restored_sigint() -> Iterator[None]:
    """Ctrl-C inside is a ``KeyboardInterrupt``, and outside it does what it did before.

    Ray Train installs a handler of its own that ends the controller, and leaves it installed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        signal.signal(signal.SIGINT, before)


def _result(config: StageConfig, record: StageRecord) -> StageResult:
    return StageResult(
        model_dir=storage.join(config.out, ADAPTER_FOLDER if config.lora else MODEL_FOLDER),
        checkpoint=record.checkpoint,
        metrics=record.metrics,
        mlflow_run_id=record.run_id,
        registered=record.registered,
    )


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
