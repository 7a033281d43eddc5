from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plan
from workflows.scaling.costs import Amounts, JobCost, load_costs, ranges_for

COST = JobCost(
    once=Amounts(cpu_seconds=8, reads=40, driver_bytes=3e8),
    a_range=Amounts(reads=6, writes=3),
    a_record=Amounts(cpu_seconds=0.02, written_bytes=7_000, calls=2, driver_bytes=2_000),
)
JOBS = dict.fromkeys(("ingest-pairs", "filter-pairs", "edit"), COST)


def took(pairs: int, **factors: float) -> dict[str, Amounts]:
    """What the jobs took: as they cost, but for some factors."""
    found = {job: cost.of(pairs, ranges_for(job, pairs), plan.CORES) for job, cost in JOBS.items()}
    return {
        job: amounts.model_copy(
            update={name: getattr(amounts, name) * factor for name, factor in factors.items()}
        )
        for job, amounts in found.items()
    }


def test_a_run_that_is_as_predicted_is_not_off() -> None:
    table, off = plan.compare(JOBS, 800, took(800))
    assert off == pytest.approx(0, abs=1e-9)
    assert table.row_count == len(Amounts.model_fields)


@pytest.mark.parametrize("name", ["cpu_seconds", "reads", "writes", "calls", "driver_bytes"])
def test_whatever_is_off_counts(name: str) -> None:
    _, off = plan.compare(JOBS, 800, took(800, **{name: 1.5}))
    assert off == pytest.approx(1 / 3) and off > plan.TOLERANCE


def test_costs_are_put_beside_those_of_earlier_runs(tmp_path: Path) -> None:
    file = tmp_path / "costs.yaml"
    plan.write_costs(file, {"edit": COST})
    memory = JobCost(once=Amounts(driver_bytes=4e8), a_record=Amounts(driver_bytes=900))
    plan.write_costs(file, {"edit": memory, "t2i": memory})
    found = load_costs(file)
    assert found.of("edit").a_record == COST.a_record.model_copy(update={"driver_bytes": 900})
    assert found.of("edit").once == COST.once.model_copy(update={"driver_bytes": 4e8})
    again = JobCost(once=Amounts(cpu_seconds=9, driver_bytes=1))
    plan.write_costs(file, {"edit": again})
    assert load_costs(file).of("edit").once == Amounts(cpu_seconds=9, driver_bytes=4e8)
    assert found.command == plan.COMMAND and found.megapixels == pytest.approx(0.2621)
