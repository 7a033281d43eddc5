from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from dim.errors import StorageError
from dim.features.encoder import Features
from dim.learning.batch import SampleOrder, WorkerOrder, draw
from training.data import Feed
from training.stage import StageConfig

SHAPE = (2, 3, 3)
CONFIG = StageConfig(
    stage="edit2",
    init="i",
    data=["d"],
    out="o",
    text_mix={"blueprint": 1, "instruction": 1},
    steps=9,
    batch_size=4,
    learning_rate=1,
    seed=5,
)


class Recorder:
    """Features that hold nothing but what was asked for, and by which thread."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []
        self.threads: set[int] = set()
        self.broken_at: int | None = None

    def fetch(self, positions: np.ndarray, texts: np.ndarray) -> list[tuple[int, int]]:
        if len(self.asked) == self.broken_at:
            raise StorageError("the store is away")
        self.asked.append([*positions.tolist(), *texts.tolist()])
        self.threads.add(threading.get_ident())
        return list(zip(positions.tolist(), texts.tolist(), strict=True))

    def collate(self, fetched: list[tuple[int, int]]) -> Features:
        told = torch.tensor(fetched)
        return Features(told, told, told, None)


def feed_of(source: Any, *, ahead: int) -> Feed:
    order = WorkerOrder(SampleOrder(11, CONFIG.batch_size, CONFIG.seed), 0, 1)
    return Feed(CONFIG, order, source, SHAPE, rows=11, ahead=ahead)


def test_fetching_ahead_changes_nothing_but_the_time() -> None:
    now, ahead = Recorder(), Recorder()
    one, other = feed_of(now, ahead=0), feed_of(ahead, ahead=2)
    for step in (0, 1, 2, 3, 7, 8):  # a run that goes on begins anywhere
        (draws, features), (same_draws, same) = one.get(step), other.get(step)
        assert torch.equal(draws.noise, same_draws.noise)
        assert torch.equal(features.latent, same.latent)
        wanted = draw(5, step, range(4), SHAPE, dropout=0.1)
        assert torch.equal(draws.noise, wanted.noise)
        assert features.latent[:, 1].tolist() == (wanted.choice >= 0.5).astype(int).tolist()
    assert now.threads == {threading.get_ident()}
    assert threading.get_ident() not in ahead.threads
    assert len(now.asked) == 6 and len(ahead.asked) > 6  # steps 4 and 5 for nobody


def test_the_next_steps_are_fetched_while_this_one_is_used_and_no_more() -> None:
    source = Recorder()
    feed = feed_of(source, ahead=2)
    steps = [feed._order.batch(step).tolist() for step in range(5)]
    feed.get(0)
    feed.get(1)
    deadline = time.monotonic() + 5
    while len(source.asked) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert sorted(asked[:4] for asked in source.asked) == sorted(steps[:4])


def test_an_error_comes_with_the_step_that_it_belongs_to() -> None:
    source = Recorder()
    source.broken_at = 1
    feed = feed_of(source, ahead=1)
    feed.get(0)
    with pytest.raises(StorageError, match="the store is away"):
        feed.get(1)
