"""`dim plan`: what is fitted, what follows from settings, and that the page says what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from dim.config import load_config
from dim.errors import ConfigError, InputError
from workflows.scaling import command, report
from workflows.scaling.costs import Amounts, Costs, JobCost, Run, fit, load_costs, ranges_for
from workflows.scaling.settings import PlanConfig
from workflows.scaling.stages import CPU, GPU, MODEL, STORE, Stage, stages

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/scaling.md"
PLAN = ROOT / "configs/plan.yaml"
COSTS = load_costs(ROOT / "configs/plan-costs.yaml")

Made = Callable[..., dict[str, Stage]]


def config_of(*overrides: str) -> PlanConfig:
    return load_config(PlanConfig, PLAN, overrides)


@pytest.fixture(scope="module")
def estimated() -> dict[str, object]:
    """What the planner has counted of the painter's passes, which no price or device changes."""
    return {}


@pytest.fixture
def planned(estimated: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> Made:
    from workflows.scaling.stages import _Planner

    slow = _Planner._estimated

    def once(self: _Planner, name: str) -> object:
        if name not in estimated:
            estimated[name] = slow(self, name)
        return estimated[name]

    monkeypatch.setattr(_Planner, "_estimated", once)

    def plan(*overrides: str, costs: Costs = COSTS) -> dict[str, Stage]:
        return {stage.name: stage for stage in stages(config_of(*overrides), costs)}

    return plan


def test_a_cost_is_found_again_in_what_it_made() -> None:
    cost = JobCost(
        once=Amounts(cpu_seconds=9, reads=20, driver_bytes=3e8),
        a_range=Amounts(cpu_seconds=0.5, reads=7, writes=3),
        a_record=Amounts(cpu_seconds=0.05, written_bytes=2e5, calls=2, driver_bytes=4000),
        a_last=Amounts(read_bytes=6e5),
    )
    sizes = ((128, 4), (400, 2), (400, 4), (400, 16))
    found = fit([Run(n, r, 2, cost.of(n, r, 2)) for n, r in sizes])
    wanted, got = cost.of(14_000_000, 3418, 512), found.of(14_000_000, 3418, 512)
    assert wanted.read_bytes == 512 * 256 * 6e5
    for name, value in wanted.model_dump().items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-6), name


def test_larger_pictures_cost_more_and_no_more_calls() -> None:
    cost = JobCost(a_record=Amounts(cpu_seconds=1, written_bytes=10, calls=2, driver_bytes=5))
    assert cost.of(3, 1, 8, pictures=4) == Amounts(
        cpu_seconds=12, written_bytes=120, calls=6, driver_bytes=15
    )


def test_no_part_of_a_cost_is_below_nothing() -> None:
    took = (((128, 4), 9.0), ((400, 2), 8.0), ((400, 4), 8.5), ((400, 16), 7.0))
    found = fit([Run(n, r, 2, Amounts(cpu_seconds=seconds)) for (n, r), seconds in took])
    parts = (found.once, found.a_range, found.a_record, found.a_last)
    assert min(part.cpu_seconds for part in parts) == 0


def test_a_job_s_ranges_are_those_it_would_cut() -> None:
    assert ranges_for("ingest-images", 14_000_000) == 27_344  # of 512
    assert ranges_for("filter-pairs", 14_000_000) == 3_418  # of 4,096
    assert ranges_for("edit", 800) == 4  # of 256


def test_every_stage_is_planned_and_waits_for_something(planned: Made) -> None:
    found = planned()
    assert [name for name in found if name.startswith("train")] == [
        "train t2i", "train edit1", "train edit2",
    ]  # fmt: skip
    assert found["data t2i"].records == 14_000_000
    assert found["data edit"].amounts.calls == pytest.approx(260_000 * (1.02 + 1.03))
    for stage in found.values():
        assert stage.wall_hours == max(stage.hours.values()) > 0
        assert stage.knob


def test_more_of_what_a_stage_waits_for_makes_it_faster(planned: Made) -> None:
    before = planned()
    assert before["data edit"].bottleneck == MODEL
    wider = planned(
        "models.designer.requests_per_minute=1e9", "models.designer.tokens_per_minute=1e15"
    )
    assert wider["data edit"].wall_hours < before["data edit"].wall_hours / 2
    assert wider["data edit"].bottleneck != MODEL
    assert before["data features, edit2"].bottleneck == GPU
    twice = planned("gpu.count=128")["data features, edit2"]
    assert twice.hours[GPU] == pytest.approx(before["data features, edit2"].hours[GPU] / 2)
    slow = planned("store.reads_per_second=1")
    assert slow["train edit2"].bottleneck == STORE
    single = planned("cpu.count=1", "cpu.cores=1")
    assert single["data filter-images"].bottleneck == CPU
    assert single["data filter-images"].wall_hours == pytest.approx(
        single["data filter-images"].amounts.cpu_seconds / 3600
    )


def test_money_follows_prices(planned: Made) -> None:
    found = planned("models.designer.input_price=1", "models.designer.output_price=0")["data edit"]
    assert found.calls_usd == pytest.approx(found.tokens[0] / 1e6)
    free = planned("gpu.price_per_hour=0", "cpu.price_per_hour=0")
    assert all(stage.devices_usd == 0 for stage in free.values())
    trained = planned()["train edit2"]
    assert trained.devices_usd == pytest.approx(trained.gpu_hours * 3.0)


def test_features_that_are_not_made_are_paid_for_at_every_step(planned: Made) -> None:
    made, live = planned()["train edit2"], planned("features=[]")
    assert "data features, edit2" not in live
    assert live["train edit2"].gpu_hours > 2 * made.gpu_hours
    assert live["train edit2"].amounts.read_bytes < made.amounts.read_bytes


def test_a_local_model_takes_gpus_and_no_money_a_call(planned: Made) -> None:
    found = planned()["data t2i"]
    assert (found.gpus, found.calls_usd) == (64, 0) and found.devices_usd > 1000


def test_what_is_wrong_is_said() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'data\.imagse'.*'images'"):
        config_of("data.imagse=3")
    with pytest.raises(ConfigError, match="gpu.name.*unknown GPU .abacus."):
        config_of("gpu.name=abacus")
    with pytest.raises(ConfigError, match="have no job 'edit'"):
        COSTS.model_copy(update={"jobs": {"t2i": JobCost()}}).of("edit")
    with pytest.raises(ConfigError, match="configuration file not found"):
        load_costs("configs/no-costs.yaml")
    with pytest.raises(InputError, match="--json and --markdown"):
        command.main(None, [], True, True)


def test_the_page_is_what_the_command_prints(
    planned: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    command.main(None, [], False, True)
    printed = capsys.readouterr().out.strip()
    found = re.search(
        r"<!-- dim plan --markdown -->\n(.*)\n<!-- end -->", PAGE.read_text(), re.DOTALL
    )
    assert found is not None and found[1].strip() == printed


def test_programs_get_numbers(planned: Made, capsys: pytest.CaptureFixture[str]) -> None:
    command.main("gpu.count=32", [], True, False)
    found = json.loads(capsys.readouterr().out)
    assert {each["stage"] for each in found} == planned().keys()
    edit = next(each for each in found if each["stage"] == "data edit")
    assert edit["bottleneck"] == MODEL and edit["usd"]["calls"] > 1000
    assert len(report.tables(list(planned().values()), config_of())[0][1]) == len(found) + 2
