"""What a workflow's step says while it works."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.outputs.manifest import Counts
from workflows.programs import job
from workflows.programs.job import data_program


def test_a_data_job_tells_how_far_it_is_and_how_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter((100.0, 130.0, 160.0))
    monkeypatch.setattr(job, "time", SimpleNamespace(monotonic=lambda: next(clock)))

    def run(config: Any, *, overwrite: bool, on_progress: Callable[[int, int, float], None]) -> Any:
        for done in (6, 7, 16):  # five were done by an earlier run
            on_progress(done, 20, done / 10)
        counts = Counts(input=1, kept=1, rejected=0, failed=0, by_reason={})
        return SimpleNamespace(cost={"usd": 1.5}, counts=counts)

    said: list[tuple[float | None, str, float]] = []
    program = data_program(Any, SimpleNamespace(run=run))
    done = program.run(None, "out", False, lambda *told: said.append(told))
    assert done.usd == 1.5 and done.said.startswith("1 record")
    assert said == [
        (0.3, "6 of 20 ranges", 0.6),
        (0.35, "7 of 20 ranges · 2 a minute", 0.7),
        (0.8, "16 of 20 ranges · 10 a minute", 1.6),
    ]
