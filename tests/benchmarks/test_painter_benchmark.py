from __future__ import annotations

import argparse
import sys

import pytest
import torch

from benchmarks import painter

SMALL = ["--heads", "7", "--tokens", "9", "--side", "4", "--steps", "2", "--repeats", "1"]


def test_a_small_comparison_runs_and_both_paint_the_same(monkeypatch, capfd):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", ["painter.py", *SMALL, "--threads", "1", "--target", "0"])
    try:
        status = painter.main()
    finally:
        torch.set_grad_enabled(True)
        torch.set_num_threads(threads)
    said, failed = capfd.readouterr()
    assert "hidden 224, 2 layers, 9 condition tokens, latent 4x4, batch 1, 2 steps" in said
    assert "speed ratio" in said and "peak memory ratio" in said
    # At this size memory is the libraries' and may differ by a page; the numbers may not.
    assert status == int("needs more memory" in failed)
    assert "not the same" not in failed


@pytest.mark.parametrize(
    ("seconds", "peak", "difference", "failure"),
    [
        (1.0, 100, 1e-5, ""),
        (1.2, 100, 1e-5, "not fast enough"),
        (1.0, 101, 1e-5, "needs more memory"),
        (1.0, 100, 0.5, "not the same"),
    ],
)
def test_a_comparison_that_is_lost_fails(capsys, seconds, peak, difference, failure):
    options = argparse.Namespace(
        heads=7, layers=2, tokens=9, side=4, batch=1, steps=2, dtype="float32", threads=1,
        repeats=1, target=1.3,
    )  # fmt: skip
    status = painter._report(
        options, {"plain": 1.5, "ours": seconds}, {"plain": 100, "ours": peak}, difference
    )
    assert status == (1 if failure else 0)
    assert failure in capsys.readouterr().err


def test_widths_that_do_not_divide_into_heads_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["painter.py", "--heads", "8"])
    with pytest.raises(SystemExit):
        painter.main()
    assert "multiple of 7" in capsys.readouterr().err
