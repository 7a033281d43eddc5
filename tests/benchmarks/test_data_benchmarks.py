"""The bars of the data jobs: each is checked, and a figure below it fails the run."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import typer

from benchmarks import data, data_calls, data_filters
from dim import records
from pipelines.outputs.shards import Shards

OPTIONS = argparse.Namespace(
    pairs=10, side=64, processes=2, pool_target=0.85, map_target=1.0, memory_target=1.15,
    small=10, large=100,
)  # fmt: skip
RATES = {"job": 9.0, "pool": 10.0, "map": 9.0}
CPU = dict.fromkeys(RATES, 1.5)
KEPT = {"job": 8, "pool": 8, "map": 8}
PEAKS = {10: 100, 100: 110}


@pytest.mark.parametrize(
    ("changes", "failure"),
    [
        ({}, None),
        ({"rates": {**RATES, "pool": 11.0}}, "the job is too slow beside the pool"),
        ({"rates": {**RATES, "map": 9.1}}, "the job is too slow beside datasets.map"),
        ({"kept": {**KEPT, "map": 7}}, "the kept records differ"),
        ({"kept": dict.fromkeys(KEPT, 0)}, "the kept records differ"),
        ({"peaks": {10: 100, 100: 116}}, "memory grows with the number of records"),
    ],
)
def test_a_filter_job_that_is_below_a_bar_fails(
    capsys: pytest.CaptureFixture[str], changes: dict[str, dict[str, float]], failure: str | None
) -> None:
    figures = {"rates": RATES, "cpu": CPU, "kept": KEPT, "peaks": PEAKS, **changes}
    assert data_filters._report(OPTIONS, **figures) == (1 if failure else 0)
    failed = capsys.readouterr().err.splitlines()
    assert failed == ([f"FAILED: {failure}"] if failure else [])


def test_its_pairs_are_what_ingest_makes_and_all_differ(tmp_path: Path) -> None:
    data_filters.make_pairs(tmp_path, 70, 64)
    shards = Shards.open(str(tmp_path), records.RAW_PAIR)
    assert shards.rows == 70 and len(shards.names) == 2
    tables = [pq.read_table(tmp_path / name) for name in shards.names]
    assert all(table.schema.equals(records.RAW_PAIR, check_metadata=True) for table in tables)
    judged = [data_filters._count_kept(str(tmp_path / name)) for name in shards.names]
    assert judged == [64, 6]  # all are good, so no way to lose one goes unseen
    sources = {value for table in tables for value in table["image"].to_pylist()}
    assert len(sources) == 70


@pytest.mark.parametrize(
    ("engine", "limited", "fails"),
    [(300.0, 6000.0, False), (287.0, 6000.0, True), (320.0, 6121.0, True), (320.0, 5879.0, True)],
)
def test_calls_that_are_below_a_bar_fail(
    monkeypatch: pytest.MonkeyPatch, engine: float, limited: float, fails: bool
) -> None:
    class NoServer:
        url = "http://nowhere"

    @contextlib.contextmanager
    def running(latency: float) -> Iterator[NoServer]:
        yield NoServer()

    monkeypatch.setattr(data_calls, "running", running)
    monkeypatch.setattr(data_calls, "bare_rate", lambda *args: 320.0)
    monkeypatch.setattr(data_calls, "engine_rate", lambda *args: engine)
    monkeypatch.setattr(data_calls, "limited_rate", lambda *args: limited)
    ask = {"count": 1, "in_flight": 64, "latency": 0.2, "side": 16, "limit": 6000, "seconds": 1}
    with pytest.raises(typer.Exit) if fails else contextlib.nullcontext():
        data_calls.main(**ask)


@pytest.mark.parametrize(("codes", "worst"), [([0, 0], 0), ([1, 0], 1), ([0, 1], 1)])
def test_all_bars_are_tried_and_one_that_fails_fails_all(
    monkeypatch: pytest.MonkeyPatch, codes: list[int], worst: int
) -> None:
    asked: list[str] = []

    def run(command: list[str], check: bool) -> argparse.Namespace:
        asked.append(command[-1])
        return argparse.Namespace(returncode=codes[len(asked) - 1])

    monkeypatch.setattr(data.subprocess, "run", run)
    assert data.main() == worst
    assert asked == ["benchmarks.data_filters", "benchmarks.data_calls"]
