"""Features: edit or t2i shards → frozen hidden states and latents → feature shards."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Unpack

import pyarrow.compute as pc
import ray.data
import typer
from pydantic import Field
from rich.console import Console

from dim import records
from dim.config import HowOnly, load_config, load_part
from dim.errors import ConfigError, InputError
from dim.features.format import Encoding, Preparation, preparation_of
from dim.learning.config import StageInputs, check_view
from dim.model.config import VlmView
from dim.records import EDIT, T2I, TextName
from infra.models import load_frozen
from infra.registry import located
from infra.storage import everywhere, open_store
from pipelines.command import ConfigFile, Out, Overrides, Overwrite, RetryFailed, settings
from pipelines.job import HowToRun, Job, JobConfig, Remaining
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards
from pipelines.outputs.summary import summary
from pipelines.ranges import Piece, ranges_of, rows_per_range
from pipelines.stages.encode import TIMEOUT_S, EncodeOptions, EncodeRanges, schema_of

_DEFAULT_TEXTS: dict[str, tuple[TextName, ...]] = {"edit": ("blueprint",), "t2i": ("caption",)}


class FeaturesConfig(JobConfig):
    """What is computed of which shards, and by whom."""

    data: str
    """Address of DIM-Edit or DIM-T2I shards."""
    model: str
    """The model that will be trained on the features: a DIM folder, a model YAML, or
    ``models:/NAME@ALIAS``."""
    texts: tuple[TextName, ...] | None = None
    """The text columns; ``blueprint`` of edits and ``caption`` of images unless given."""
    encoding: Encoding = "bf16"
    """How hidden states are kept: ``bf16``, or ``int8`` with a scale a token: half the size."""
    buckets: bool = False
    """As in training: cut each sample to the nearest of SANA's shapes, and not to a square."""
    vlm_view: VlmView = "whole"
    """As in training: what the understanding model sees of a source, ``whole`` or ``region``."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """As in training: ``bf16`` computes in bfloat16 where there is a GPU."""
    row_group_mb: float = Field(4, gt=0)
    """Size of a row group at most, in units of 2**20 bytes: what training fetches at a time."""
    encode_batch: int = Field(16, ge=1)
    """Records of similar length in one forward pass."""
    workers: Annotated[int, HowOnly] = Field(1, ge=1)
    """Processes that each hold the frozen parts."""
    cpus_per_worker: Annotated[float, HowOnly] = Field(1, gt=0)
    range_timeout_s: Annotated[float, HowOnly] = Field(TIMEOUT_S, gt=0)
    """Seconds that some 256 records may take; what takes longer is begun again, and fails in the
    end."""
    gpus_per_worker: Annotated[float, HowOnly] = Field(0, ge=0)
    """A share lets one process read and decode while another computes on the same GPU."""


def run(config: FeaturesConfig, **how: Unpack[HowToRun]) -> Manifest:
    """Make feature shards. See :meth:`pipelines.job.Job.run` for reruns and errors.

    Raises:
        InputError: also if the shards do not have one of the texts.
        CheckpointError: the model cannot be loaded.
    """
    config = config.model_copy(update={"model": located(config.model)})
    shards = Shards.open(config.data, EDIT, T2I)
    options = _options(config, shards)
    preparation = _preparation(config, edits=options.kind == "edit")
    ranges = ranges_of(shards, rows_per_range(shards.rows, config.rows_per_file))
    job = Job(
        "features",
        config,
        schema_of(options, preparation),
        identity={**shards.identity, "preparation": preparation.model_dump()},
        rows=shards.rows,
        ranges=len(ranges),
        group_bytes=int(config.row_group_mb * 2**20),
    )
    return job.run(lambda work: encode(shards, ranges, config, options, preparation, work), **how)


def encode(
    shards: Shards,
    ranges: list[list[Piece]],
    config: FeaturesConfig,
    options: EncodeOptions,
    preparation: Preparation,
    work: Remaining,
) -> ray.data.Dataset:
    """Ranges of the shards → their features."""
    rows = [
        {"number": number, "pieces": [asdict(piece) for piece in ranges[number]]}
        for number in work.todo
    ]
    return ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        EncodeRanges,
        fn_constructor_args=(
            work.output,
            everywhere(config.model),
            options,
            preparation,
            shards.store,
            config.gpus_per_worker > 0,
            max(1, int(config.cpus_per_worker)),
            config.range_timeout_s,
        ),
        batch_format="pyarrow",
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(rows))),
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
    )


def _options(config: FeaturesConfig, shards: Shards) -> EncodeOptions:
    kind: Any = records.kind_of(shards.schema)
    texts = config.texts or _DEFAULT_TEXTS[kind]
    lacking = [text for text in texts if text not in shards.schema.names]
    if lacking:
        raise InputError(f"{config.data} holds {kind} records, which have no {lacking[0]}")
    return EncodeOptions(
        kind=kind,
        texts=tuple(sorted(set(texts))),
        encoding=config.encoding,
        precision=config.precision,
        encode_batch=config.encode_batch,
    )


def _preparation(config: FeaturesConfig, *, edits: bool) -> Preparation:
    frozen = load_frozen(config.model)
    if edits:
        check_view(frozen.config, config.vlm_view, config.model)
    elif config.vlm_view != "whole":
        raise InputError("the understanding model sees no image of t2i records: leave vlm_view out")
    return preparation_of(
        frozen,
        edits=edits,
        resolution=frozen.config.sampling.resolution,
        buckets=config.buckets,
        vlm_view=config.vlm_view,
    )


def _stage_settings(file: Path, data: str | None) -> dict[str, Any]:
    """What a training stage says about its features."""
    stage = load_part(StageInputs, file)
    if data is None and len(stage.uris) > 1:
        raise ConfigError(
            f"{file} trains on {len(stage.uris)} data sets: give one of them as --data at a time"
        )
    return {
        "data": data or stage.uris[0],
        "model": stage.init,
        "texts": list(stage.texts),
        "precision": stage.precision,
        "buckets": stage.buckets,
        "vlm_view": stage.vlm_view,
    }


def _say_error(shards: Shards) -> None:
    """How far 8-bit hidden states are off, over the records of the first file."""
    columns = [name for name in shards.schema.names if name.endswith("_error")]
    with shards.store.open_parquet(shards.names[0]) as parquet:
        table = parquet.read(columns=columns)
    for name in columns if table.num_rows else ():
        Console(soft_wrap=True, highlight=False).print(
            f"{name}: {pc.mean(table[name]).as_py():.2%} on average, "
            f"{pc.max(table[name]).as_py():.2%} at most (relative, first file)"
        )


def main(
    out: Out,
    data: Annotated[
        str | None, typer.Option(help="DIM-Edit or DIM-T2I shards; default: the stage's.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="DIM folder or model YAML to be trained; default: the stage's init."),
    ] = None,
    stage: Annotated[
        Path | None, typer.Option(help="Stage file to take data, model and texts from.")
    ] = None,
    overrides: Overrides = None,
    config: ConfigFile = None,
    overwrite: Overwrite = False,
    retry_failed: RetryFailed = False,
) -> None:
    """Compute the frozen hidden states and latents of shards once, to train on them many times.

    Killed and run again, what was computed is kept.
    """
    staged = settings(**_stage_settings(stage, data)) if stage else []
    given = settings(data=data, model=model, out=out)
    chosen = load_config(FeaturesConfig, config, [*staged, *(overrides or []), *given])
    manifest = run(chosen, overwrite=overwrite, retry_failed=retry_failed)
    summary(out, manifest)
    _say_error(Shards(open_store(out), manifest))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
