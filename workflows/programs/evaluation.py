"""How often a model does what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from infra.cost import counted_cost
from infra.tracking import Tracking
from pipelines import evaluate
from pipelines.job import TrackingConfig
from workflows.programs.program import Done, Program, Tell, hash_of


class EvaluateStepConfig(evaluate.EvaluateConfig):
    """An evaluation that is logged."""

    tracking: TrackingConfig | None = None


def _evaluate(config: EvaluateStepConfig, out: str, anew: bool, tell: Tell) -> Done:
    if config.tracking is not None and config.tracking.uri is not None:
        tracking = Tracking(config.tracking.uri, config.tracking.experiment)
        with (
            tracking.run("evaluate", {"model": config.model, "data": config.data}) as run,
            counted_cost(run, config.tracking.prices),
        ):
            evaluation = evaluate.run(config, overwrite=anew)
            numbers = evaluation.metrics()
            run.log_metrics(numbers)
    else:
        evaluation = evaluate.run(config, overwrite=anew)
        numbers = evaluation.metrics()
    exact = ", ".join(f"{numbers[f'exact/{way}']:.0%} {evaluate.NAMES[way]}"
                      for way in evaluation.ways)  # fmt: skip
    return Done(f"exact: {exact}", {"metrics": numbers})


def _of_evaluation(config: EvaluateStepConfig, result: Mapping[str, Any]) -> str | None:
    return hash_of(str(config.out), evaluate.NUMBERS_FILE)


PROGRAMS = {
    "evaluate": Program(
        EvaluateStepConfig, "evaluation", _evaluate, _of_evaluation,
        how=frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "batch_size",
                       "nodes_wait_s", "tracking"}),
    )
}  # fmt: skip
