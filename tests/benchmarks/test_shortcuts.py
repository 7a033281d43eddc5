"""The benchmark of shortcuts runs, and reports each of them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from benchmarks import shortcuts


def test_it_reports_every_shortcut(
    tiny_model_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    arguments = ["shortcuts", "--model", str(tiny_model_dir), "--edits", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", arguments)
    shortcuts.main()
    said = capsys.readouterr().out
    assert "int8 weights: weights of 8 bits need torchao" in said
    rows = [line for line in said.splitlines() if "of 2" in line]
    assert len(rows) == 1 + len(shortcuts.THRESHOLDS)
    assert "whole steps" in rows[0] and "0 of 255" in rows[0]
    assert "step cache 0.03" in rows[1]
