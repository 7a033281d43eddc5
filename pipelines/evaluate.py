"""Evaluate a trained model on held-out tabletop edits: how many come out exactly as they should."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import typer
from pydantic import Field, field_validator
from ray.data import ActorPoolStrategy
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest

from dim.config import StrictModel, dump_config, load_config
from dim.errors import CheckpointError, InputError
from dim.records import EDIT
from infra.capacity import WAIT_S
from infra.cost import counted_cost
from infra.fingerprint import fingerprint
from infra.registry import located
from infra.storage import everywhere, join, open_store
from infra.tracking import Run, Tracking, code_version, default_uri
from pipelines.cluster import connect
from pipelines.command import ConfigFile, Overrides, Overwrite, settings
from pipelines.job import TrackingConfig
from pipelines.outputs.shards import Shards
from pipelines.ranges import read
from pipelines.stages.paint import BLUEPRINT, INSTRUCTION, SELF, WAYS, PaintEdits

PAINTED_FILE, NUMBERS_FILE = "painted.parquet", "evaluation.json"
OF_FILE = "evaluated.json"
"""Which model and records, and how: the same exactly when the numbers would be."""

NAMES = {BLUEPRINT: "with blueprints", SELF: "with its own blueprints", INSTRUCTION: "without"}


class EvaluateConfig(StrictModel):
    """What is painted, and how."""

    model: str
    """Folder of a DIM, or ``models:/NAME@ALIAS``."""
    data: str
    """Address of held-out DIM-Edit shards of the tabletop."""
    out: str | None = None
    """Folder for what was painted (``painted.parquet``) and counted (``evaluation.json``)."""
    ways: tuple[str, ...] = WAYS
    """From whose words: the shards' blueprints, the model's own, or the bare instruction."""
    steps: int | None = Field(None, ge=1)
    """Sampler steps; the model's default unless given."""
    guidance_scale: float | None = Field(None, ge=1)
    """Guidance scale; the model's default unless given."""
    workers: int = Field(2, ge=1)
    """Processes that each hold a model."""
    cpus_per_worker: float = Field(0.5, gt=0)
    """What each is reckoned to need; below 1, so that two cores can also read the shards."""
    gpus_per_worker: float = Field(0.0, ge=0)
    batch_size: int = Field(32, ge=1)
    nodes_wait_s: float = Field(WAIT_S, gt=0)
    """Seconds to wait where no node of the cluster has what a worker wants and none will come."""
    tracking: TrackingConfig | None = None
    """Log to MLflow. Without this, only if MLFLOW_TRACKING_URI is set. Without ``out``, its file is
    in the current folder."""

    @field_validator("ways")
    @classmethod
    def _known(cls, ways: tuple[str, ...]) -> tuple[str, ...]:
        unknown = sorted(set(ways) - set(WAYS))
        if unknown or not ways:
            raise ValueError(f"unknown way {unknown}; there are {', '.join(WAYS)}")
        return ways


@dataclass(frozen=True)
class Share:
    """``exact`` of ``count`` edits came out exactly, ``strict`` of these strictly so."""

    exact: int
    strict: int
    count: int

    @property
    def accuracy(self) -> float:
        """From 0 to 1; 0 where there is nothing to count."""
        return self.exact / self.count if self.count else 0.0

    @property
    def strict_accuracy(self) -> float:
        """The same of those that are strictly exact."""
        return self.strict / self.count if self.count else 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of ``accuracy``; edits count as independent."""
        if not self.count:
            return 0.0, 1.0
        found = binomtest(self.exact, self.count).proportion_ci(method="wilson")
        return float(found.low), float(found.high)


@dataclass(frozen=True)
class Evaluation:
    """Every painted edit (schema ``pipelines.stages.paint.PAINTED``), and sums over them."""

    painted: pa.Table

    def share(self, way: str, *, referential: bool | None = None, kind: str | None = None) -> Share:
        """Exact edits of one way; of direct or referential instructions or one kind if asked."""
        chosen = pc.field("way") == way
        if referential is not None:
            chosen &= pc.field("referential") == referential
        if kind is not None:
            chosen &= pc.field("kind") == kind
        rows = self.painted.filter(chosen)
        exact, strict = (int(pc.sum(rows[name]).as_py() or 0) for name in ("exact", "strict"))
        return Share(exact, strict, rows.num_rows)

    @property
    def ways(self) -> list[str]:
        """The ways that were painted, in their order of mention."""
        return [way for way in WAYS if way in self.painted["way"].unique().to_pylist()]

    @property
    def kinds(self) -> list[str]:
        """The kinds of edits among the samples."""
        return sorted(self.painted["kind"].unique().to_pylist())

    def designed_right(self, way: str) -> float:
        """Share of the blueprints whose edit area and result are the oracle's."""
        rows = self.painted.filter(pc.field("way") == way)
        return float(pc.mean(rows["designed_right"]).as_py() or 0.0)

    def metrics(self) -> dict[str, float]:
        """The numbers that go to MLflow, each from 0 to 1.

        ``low`` and ``high`` are the ends of the 95 % interval of what stands before them.
        """
        values: dict[str, float] = {}
        for way in self.ways:
            for end, referential in (("", None), ("/direct", False), ("/referential", True)):
                share = self.share(way, referential=referential)
                values[f"exact/{way}{end}"] = share.accuracy
                values[f"exact/{way}{end}/low"], values[f"exact/{way}{end}/high"] = share.interval
                values[f"strict/{way}{end}"] = share.strict_accuracy
        if SELF in self.ways:
            values["designed_right/self"] = self.designed_right(SELF)
        return values


def run(
    config: EvaluateConfig,
    *,
    overwrite: bool = False,
    on_progress: Callable[[int, int], None] = lambda painted, of: None,
) -> Evaluation:
    """Paint and check every record of ``config.data``.

    An evaluation that lies in ``config.out``, of the same model, records and settings, is handed
    back; ``overwrite``: it is made again. ``on_progress`` is told how many edits are painted, of
    how many; each record is one for each way.

    Raises:
        CheckpointError: there is no model.
        InputError: there are no shards, or they are not of the tabletop.
    """
    model = located(config.model)
    if not open_store(model).is_file("dim.json"):
        raise CheckpointError(f"no model at {model} (a model folder holds a dim.json)")
    shards = Shards.open(config.data, EDIT)
    _check_tabletop(shards)
    of = _what_is_evaluated(config, model, shards)
    if config.out is not None and not overwrite and _is_written(config.out, of):
        return read_written(config.out)
    with _tracked(config, shards, of) as run:
        if config.out is not None and not overwrite and _holds(config.out, of):
            evaluation = read_written(config.out)  # painted by a call that could not log it
        else:
            connect(config.nodes_wait_s)
            evaluation = _painted(config, model, shards, on_progress)
            if config.out is not None:
                write_painted(evaluation, config.out, of)
        if run is not None:
            run.log_metrics(evaluation.metrics())
    if config.out is not None:
        write_numbers(evaluation, config.out)
    return evaluation


def _painted(
    config: EvaluateConfig, model: str, shards: Shards, on_progress: Callable[[int, int], None]
) -> Evaluation:
    painted = read(shards).map_batches(
        PaintEdits,
        fn_constructor_args=(everywhere(model), config.ways, config.steps, config.guidance_scale),
        batch_format="pyarrow",
        batch_size=config.batch_size,
        compute=ActorPoolStrategy(size=config.workers),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
    )
    tables: list[pa.Table] = []
    for table in painted.iter_batches(batch_format="pyarrow", batch_size=None):
        tables.append(table)
        rows = sum(each.num_rows for each in tables)
        on_progress(rows, shards.manifest.counts.kept * len(config.ways))
    return Evaluation(pa.concat_tables(tables).sort_by([("id", "ascending")]))


@contextmanager
def _tracked(config: EvaluateConfig, shards: Shards, of: Mapping[str, Any]) -> Iterator[Run | None]:
    """An MLflow run around the evaluation, if one is wanted."""
    chosen = config.tracking
    if chosen is None and not os.environ.get("MLFLOW_TRACKING_URI"):
        yield None
        return
    chosen = chosen or TrackingConfig()
    tracking = Tracking(chosen.uri or default_uri(config.out or "."), chosen.experiment)
    tags = {"job": "evaluate", "model_hash": str(of["model"]), **code_version()}
    with (
        tracking.run("evaluate", dump_config(config), tags) as run,
        counted_cost(run, chosen.prices),
    ):
        run.log_dataset(
            "evaluate input",
            shards.store.uri,
            str(of["data"])[:36],
            context="input",
            profile=shards.identity,
        )
        yield run


def write_painted(evaluation: Evaluation, out: str, of: Mapping[str, Any]) -> None:
    """Keep what was painted in the folder ``out``; it is finished by ``write_numbers``.

    Args:
        evaluation: what came out.
        out: where it is kept.
        of: what was evaluated, and how.

    Raises:
        StorageError: it cannot be written.
    """
    store = open_store(out)
    for name in (NUMBERS_FILE, OF_FILE):  # what they tell is not of the new file
        store.delete(name)
    with store.open_output(PAINTED_FILE) as file:
        pq.write_table(evaluation.painted, file)
    store.write(OF_FILE, _as_json(of))


def write_numbers(evaluation: Evaluation, out: str) -> None:
    """Keep what was counted, after which an evaluation is done.

    Raises:
        StorageError: it cannot be written.
    """
    open_store(out).write(NUMBERS_FILE, _as_json(evaluation.metrics()))


def _what_is_evaluated(config: EvaluateConfig, model: str, shards: Shards) -> dict[str, Any]:
    how = config.model_dump(include={"ways", "steps", "guidance_scale"}, mode="json")
    return {"model": fingerprint(model), "data": shards.identity["files"], **how}


def _is_written(out: str, of: Mapping[str, Any]) -> bool:
    return open_store(out).is_file(NUMBERS_FILE) and _holds(out, of)


def _holds(out: str, of: Mapping[str, Any]) -> bool:
    store = open_store(out)
    return store.is_file(OF_FILE) and store.read(OF_FILE) == _as_json(of)


def _as_json(values: Mapping[str, Any]) -> bytes:
    return f"{json.dumps(values, indent=2)}\n".encode()


def read_written(out: str) -> Evaluation:
    """The evaluation that :func:`write_painted` has kept in ``out``.

    Raises:
        StorageError: there is none.
    """
    with open_store(out).open_parquet(PAINTED_FILE) as file:
        return Evaluation(file.read())


def read_numbers(out: str) -> dict[str, float]:
    """The numbers of the evaluation in ``out``, as :meth:`Evaluation.metrics` gives them.

    Raises:
        StorageError: there are none.
    """
    numbers: dict[str, float] = json.loads(open_store(out).read(NUMBERS_FILE))
    return numbers


def table(evaluation: Evaluation) -> Table:
    """The result for a terminal: ways as columns, kinds of edits as rows."""
    shown = Table(title="edits on held-out scenes that are exact, and strictly exact")
    shown.add_column("")
    for way in evaluation.ways:
        shown.add_column(NAMES[way], justify="right")
    for name, values in summary(evaluation):
        shown.add_row(name, *values)
    return shown


def summary(evaluation: Evaluation) -> list[tuple[str, list[str]]]:
    """Rows of the result: a name and one cell a way."""
    groups: list[tuple[str, dict[str, Any]]] = [
        ("direct instructions", {"referential": False}),
        ("referential instructions", {"referential": True}),
        *((f"direct: {kind}", {"kind": kind, "referential": False}) for kind in evaluation.kinds),
    ]
    rows = []
    for name, chosen in groups:
        shares = [evaluation.share(way, **chosen) for way in evaluation.ways]
        if shares[0].count:
            rows.append((name, [_in_words(share) for share in shares]))
    return rows


def main(
    model: Annotated[
        str, typer.Option("--model", "-m", help="Folder of a DIM, or models:/NAME@ALIAS.")
    ],
    data: Annotated[str, typer.Option(help="Held-out DIM-Edit shards of the tabletop.")],
    out: Annotated[
        str | None, typer.Option(help="Folder to keep what was painted and counted.")
    ] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Paint held-out tabletop edits and count those that come out exactly.

    What lies in the output folder already, of the same model and edits, is not painted again.
    """
    given = settings(model=model, data=data, out=out)
    chosen = load_config(EvaluateConfig, config, [*given, *(overrides or [])])
    evaluation = run(chosen, overwrite=overwrite)
    Console().print(table(evaluation))


def _in_words(share: Share) -> str:
    return f"{share.accuracy:.0%} of {share.count} ({share.strict_accuracy:.0%} strictly)"


def _check_tabletop(shards: Shards) -> None:
    for name in shards.names[:1]:
        with shards.store.open_parquet(name) as file:
            first = next(file.iter_batches(1, columns=["provenance"]), None)
        if first is None or "tabletop" not in str(first["provenance"][0]):
            raise InputError(
                f"{join(shards.store.uri, name)} holds no tabletop edits; only those can be checked"
            )


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
