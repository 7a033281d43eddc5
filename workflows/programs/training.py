"""A stage of training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from training import record as records
from training import train
from training.stage import OPERATIONAL_KEYS, StageConfig
from workflows.programs.program import Done, Program, Tell, hash_of


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
    return hash_of(config.out, records.STAGE_FILE) if record and record.finished else None


PROGRAMS = {
    "train": Program(
        StageConfig, "training", _train, _of_stage,
        parts={"model": records.MODEL_FOLDER, "adapter": records.ADAPTER_FOLDER},
        how=OPERATIONAL_KEYS, clear=_discard,
    )
}  # fmt: skip
