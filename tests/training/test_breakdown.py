from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from dim.learning.batch import draw
from dim.model.flow import LEVELS, quartile_of
from training.breakdown import Breakdown

CPU = torch.device("cpu")


def rows_of(*rows: tuple[float, bool, int, int]) -> tuple[torch.Tensor, ...]:
    """Losses, whether they count, places in the table and sources, a row each."""
    losses, counted, index, source = zip(*rows, strict=True)
    kinds = (torch.float32, torch.bool, torch.int64, torch.int64)
    return tuple(
        torch.tensor(values, dtype=kind)
        for values, kind in zip((losses, counted, index, source), kinds, strict=True)
    )


def test_losses_are_averaged_by_source_and_by_quartile() -> None:
    parts = Breakdown(["photos", "drawings", "nothing"], CPU)
    parts.add(*rows_of((1.0, True, 0, 0), (2.0, True, 337, 1), (50.0, False, 999, 2)))
    parts.add(*rows_of((6.0, True, 999, 0)))
    parts.end_step(skipped=False)
    parts.add(*rows_of((5.0, True, 499, 1)))
    parts.end_step(skipped=False)
    parts.add(*rows_of((math.nan, True, 500, 2), (1.0, True, 0, 0)))
    parts.end_step(skipped=True)
    assert parts.read() == {
        "loss/photos": 3.5,
        "loss/drawings": 3.5,
        "loss/sigma_q1": 1.5,
        "loss/sigma_q2": 5.0,
        "loss/sigma_q4": 6.0,
    }
    assert parts.read() == {}
    parts.add(*rows_of((3.0, True, 500, 2)))
    parts.restart()
    parts.end_step(skipped=False)
    assert parts.read() == {}


def test_a_single_source_has_no_loss_of_its_own() -> None:
    parts = Breakdown(["photos"], CPU)
    parts.add(*rows_of((1.0, True, 662, 0)))
    parts.end_step(skipped=False)
    assert parts.read() == {"loss/sigma_q4": 1.0}


def test_each_quartile_has_a_quarter_of_the_draws() -> None:
    index = draw(0, 0, range(20_000), (1, 1, 1), dropout=0.0).index
    shares = np.bincount(quartile_of(index).numpy(), minlength=4) / len(index)
    assert shares == pytest.approx([0.25] * 4, abs=0.01)
    every = quartile_of(torch.arange(LEVELS))
    assert np.bincount(every.numpy()).tolist() == [338, 162, 162, 338]
    assert torch.equal(every, every.sort().values)
