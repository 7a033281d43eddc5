"""The published sizes' benchmark with the tiny model: every row works, and a wrong claim fails."""

from __future__ import annotations

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published_size
from benchmarks.published_size import Made, Row, Said


@pytest.fixture
def options(tmp_path: Path) -> argparse.Namespace:
    return argparse.Namespace(size="tiny", resolution=64, work=str(tmp_path))


def test_every_row_goes_on_with_what_the_first_have_made(options: argparse.Namespace) -> None:
    assert "the same bits out and in" in published_size.lay_out(options)
    assert published_size.make_features(options).startswith("4 pairs")
    assert "numbers learn" in published_size.train_adapter(options)
    assert "numbers learn" in published_size.train_all("adamw", options)
    assert "in two files, the same bits" in published_size.save_and_load(options)
    assert published_size.edit(options).startswith("64 px")


def test_what_shapes_say_of_the_tiny_model() -> None:
    config = published_size._config("tiny", 64)
    counts = published_size._counts(config)
    assert published_size.saved_in_half(config).nbytes == 2 * sum(counts.values())
    # weights, gradients and two moments, all of single precision, and something for a pass
    learning = counts["connector"] + counts["painter"]
    assert published_size.planned("adamw", config).nbytes > 16 * learning


@pytest.mark.parametrize(("peak", "good"), [(1.05e9, True), (0.85e9, False), (1.2e9, False)])
def test_memory_must_be_what_was_said(
    peak: float,
    good: bool,
    options: argparse.Namespace,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def finished(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        told = json.dumps(Made(3.0, peak, "done")._asdict())
        return subprocess.CompletedProcess(command, 0, f"some line\n{told}\n", "")

    monkeypatch.setattr(subprocess, "run", finished)
    options.size = "published"
    row = Row("edit", published_size.edit, lambda config: Said(1e9, "so"))
    assert published_size._shown(row, options) is good
    assert ("NOT AS SAID" in capsys.readouterr().out) is not good


def test_what_cannot_fit_is_not_begun_and_what_fails_is_shown(
    options: argparse.Namespace, capsys: pytest.CaptureFixture[str]
) -> None:
    row = Row("edit", published_size.edit, lambda config: Said(1e15, "so"))
    assert published_size._shown(row, options)
    assert "1000000.0 GB (so) | does not fit into" in capsys.readouterr().out
    row = Row("edit", published_size.edit, lambda config: Said(1e3, "so"))
    assert not published_size._shown(row, options)  # there is no model yet
    assert "FAILED: dim.errors.CheckpointError" in capsys.readouterr().out
