"""How often a model does what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipelines import evaluate
from pipelines.evaluate import EvaluateConfig
from workflows.programs.program import Done, Program, Tell, hash_of


def _evaluate(config: EvaluateConfig, out: str, anew: bool, tell: Tell) -> Done:
    def on_progress(painted: int, of: int) -> None:
        tell(painted / of, f"{painted:,} of {of:,} edits painted")

    evaluation = evaluate.run(config, overwrite=anew, on_progress=on_progress)
    numbers = evaluation.metrics()
    exact = ", ".join(f"{numbers[f'exact/{way}']:.0%} {evaluate.NAMES[way]}"
                      for way in evaluation.ways)  # fmt: skip
    return Done(f"exact: {exact}", {"metrics": numbers})


def _of_evaluation(config: EvaluateConfig, result: Mapping[str, Any]) -> str | None:
    return hash_of(str(config.out), evaluate.NUMBERS_FILE)


PROGRAMS = {
    "evaluate": Program(
        EvaluateConfig, "evaluation", _evaluate, _of_evaluation,
        how=frozenset({"workers", "cpus_per_worker", "gpus_per_worker", "batch_size",
                       "nodes_wait_s", "tracking"}),
    )
}  # fmt: skip
