from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import features
from benchmarks.features import Result
from dim import records
from tests.datasets import edit_rows, write_dataset
from tests.feature_shards import write_features


@pytest.mark.parametrize(
    ("read", "held", "loss", "failures"),
    [
        (1.0, 0.9, 0.501, []),
        (2.1, 0.9, 0.501, ["features that are read are not 1 times as fast as live"]),
        (1.0, 2.2, 0.501, ["features that are held are not 1 times as fast as live"]),
        (1.0, 0.9, 0.51, ["features that are held give other losses than live ones"]),
    ],
)
def test_a_comparison_that_is_lost_fails(
    capsys: pytest.CaptureFixture[str], read: float, held: float, loss: float, failures: list[str]
) -> None:
    result = Result(
        {"live": 2.0, "read": read, "held": held},
        {"live": [0.4, 0.5], "read": [0.4, 0.5], "held": [0.4, loss]},
        samples=20,
    )
    assert features._report(result, 1.0) == (1 if failures else 0)
    said, failed = capsys.readouterr()
    assert "live      10.0 samples/s    1.00 x live" in said
    assert failed.splitlines() == [f"FAILED: {failure}" for failure in failures]


def test_the_three_ways_take_the_same_steps(tiny_model_dir: Path, tmp_path: Path) -> None:
    edit_data = write_dataset(tmp_path / "plain", edit_rows(12), records.EDIT)
    made = write_features(edit_data, tmp_path / "made", tiny_model_dir, texts=("blueprint",))
    options = argparse.Namespace(model=str(tiny_model_dir), batch=4, steps=2, repeats=1)
    result = features._compare(options, edit_data, made)
    assert list(result.losses) == list(result.seconds) == ["live", "read", "held"]
    assert result.losses["read"] == result.losses["held"] != result.losses["live"]
    assert result.losses["read"] == pytest.approx(result.losses["live"], rel=features.SAME)
    assert all(0 < seconds < 60 for seconds in result.seconds.values())
