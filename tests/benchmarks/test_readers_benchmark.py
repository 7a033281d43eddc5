"""The benchmark of readers, as far as it goes without the others' packages."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from benchmarks import readers
from tests.rclone_server import running


def test_our_shards_are_read_from_the_server(tmp_path: Path) -> None:
    buckets = tmp_path / "buckets"
    readers.write_shards(buckets / readers.BUCKET / "shards", 6)
    options = argparse.Namespace(samples=6, batch=2, window=4)
    with running(buckets) as url:
        assert readers._in_process("ours, in a window", url, options) > 0


@pytest.mark.parametrize(("litdata", "status"), [(90.0, 0), (110.0, 0), (130.0, 1)])
def test_it_fails_when_another_is_faster(
    litdata: float, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    best = {"ours": 100.0, "ours, in a window": 120.0, "LitData": litdata, "WebDataset": 60.0}
    assert readers.report(best) == status
    assert ("FAILED" in capsys.readouterr().out) == bool(status)


def test_it_says_what_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["readers"])
    assert readers.main() == 1
    assert "litdata, webdataset cannot be imported" in capsys.readouterr().out
