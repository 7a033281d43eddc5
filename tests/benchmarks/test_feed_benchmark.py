from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from benchmarks import feed
from benchmarks.feed import Result

OPTIONS: dict[str, Any] = {"batch": 4, "window": 64, "steps": 200, "step_ms": 1.0, "side": 64}


@pytest.mark.parametrize(
    ("changes", "failures"),
    [
        ({}, []),
        ({2: Result("over all", 100, 1.0, 20, 0.02)}, ["memory grows 2.0 times with the data"]),
        ({0: Result("over all", 10, 1.0, 10, 0.2)}, ["steps wait for data 20.0% of the time"]),
        (
            {3: Result("within 64", 100, 0.5, 10, 0.0)},
            ["0.500 row groups are read a sample within a window"],
        ),
    ],
)
def test_a_bar_that_is_missed_fails(
    capsys: pytest.CaptureFixture[str], changes: dict[int, Result], failures: list[str]
) -> None:
    results = [
        Result(order, samples, read, 10, 0.02)
        for samples in (10, 100)
        for order, read in (("over all", 1.0), ("within 64", 0.016))
    ]
    for place, result in changes.items():
        results[place] = result
    assert feed.report(results, argparse.Namespace(**OPTIONS)) == (1 if failures else 0)
    said, failed = capsys.readouterr()
    assert "10 samples, mixed over all" in said
    assert failed.splitlines() == [f"FAILED: {failure}" for failure in failures]


def test_a_pass_reads_what_its_order_needs(tmp_path: Path) -> None:
    options = argparse.Namespace(**OPTIONS | {"steps": 20})
    uri = feed.write_images(tmp_path, 400, 64)
    apart, near = (feed._take(options, uri, 400, window) for window in (None, 16))
    assert apart.samples == near.samples == 400
    assert 0.5 < apart.read <= 1.3  # of fewer groups than a worker reads ahead, some come together
    assert near.read < 0.2 and 0 <= near.wait <= 1
    assert apart.held > 0
