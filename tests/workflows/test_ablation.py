"""The ablation at a fraction of its size, and its table on numbers made up."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from dim.config import load_config
from pipelines.evaluate import Evaluation
from pipelines.stages.paint import BLUEPRINT, INSTRUCTION, PAINTED
from workflows.ablation import (
    CONFIGS,
    AblationConfig,
    Result,
    arms,
    as_markdown,
    as_numbers,
    draw_curves,
    run,
)


def painted(way: str, exact: list[bool], referential: bool, kind: str) -> list[dict]:
    return [
        {"id": f"{kind}-{n}", "kind": kind, "referential": referential, "way": way,
         "exact": value, "strict": False}
        for n, value in enumerate(exact)
    ]  # fmt: skip


def result(number: int, way: str, direct: int, referential: int) -> Result:
    rows = painted(way, [n < direct for n in range(10)], False, "add")
    rows += painted(way, [n < referential for n in range(5)], True, "remove")
    curves = {"loss": [[(1, 2.0), (2, 1.0)]], "validation_exact": [[(2, 0.5)]]}
    return Result(arms(0.25)[number], Evaluation(pa.Table.from_pylist(rows, PAINTED)), curves)


RESULTS = [result(0, INSTRUCTION, 2, 0), result(1, BLUEPRINT, 8, 5), result(2, BLUEPRINT, 6, 3)]


def test_the_table_says_how_often_each_arm_is_exact_and_how_sure_that_is(tmp_path: Path) -> None:
    numbers = as_numbers(RESULTS)
    assert list(numbers) == ["all", "direct", "referential", "add", "remove"]
    arm = numbers["all"]["oracle blueprint"]
    assert arm["exact"] == pytest.approx(13 / 15) and arm["count"] == 15
    assert numbers["referential"]["instruction"]["exact"] == 0
    low, high = RESULTS[1].share().interval  # Wilson's of 13 in 15
    assert (low, high) == pytest.approx((0.6212, 0.9626), abs=1e-3)
    text = as_markdown(RESULTS)
    assert "| referential | 0% (0-43) of 5, 0% | 100% (57-100) of 5, 0% |" in text
    assert "noisy blueprint (25% wrong)" in text.splitlines()[0]
    draw_curves(RESULTS, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size == (1200, 480)


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_every_arm_is_trained_on_its_own_words_and_goes_on_where_it_stopped(
    tmp_path: Path,
) -> None:
    small = ["pairs=24", "held_out=6", "steps=2", "seeds=[4]", "noise=1"]
    small += ['stage_overrides=["batch_size=4","workers=1","warmup_steps=1","log_every=1"]']
    config = load_config(
        AblationConfig, CONFIGS / "ablation.yaml", [*small, f"out={json.dumps(str(tmp_path))}"]
    )
    results = run(config, Console(quiet=True))
    assert [each.share().count for each in results] == [6, 6, 6]
    assert [[step for step, _ in each.curves["loss"][0]] for each in results] == [[1, 2]] * 3
    told = [each.evaluation.painted["text"].to_pylist() for each in results]
    assert all("Edit Area" not in text for text in told[0])
    assert all("Edit Area" in text for text in told[1]) and told[1] != told[2]
    stages = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert stages == ["blueprint-noisy-1-4", "blueprint-oracle-4", "instruction-oracle-4"]
    numbers = json.loads((tmp_path / "table.json").read_text())
    assert numbers["all"].keys() == {each.arm.name for each in results}
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("training/*/model/*")}
    assert as_numbers(run(config, Console(quiet=True))) == as_numbers(results)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.glob("training/*/model/*")}
    assert before and before == after
