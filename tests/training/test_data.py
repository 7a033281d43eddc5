from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import torch

from dim.errors import InputError
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

    def batch(self, positions: np.ndarray, texts: np.ndarray) -> Features:
        if len(self.asked) == self.broken_at:
            raise InputError("sample 'x' is damaged")
        self.asked.append([*positions.tolist(), *texts.tolist()])
        self.threads.add(threading.get_ident())
        told = torch.tensor(self.asked[-1])
        return Features(told, told, told, None)


def feed_of(source: Any, *, ahead: bool) -> Feed:
    order = WorkerOrder(SampleOrder(11, CONFIG.batch_size, CONFIG.seed), 0, 1)
    return Feed(CONFIG, order, source, SHAPE, ahead=ahead)


def test_fetching_ahead_changes_nothing_but_the_time() -> None:
    now, ahead = Recorder(), Recorder()
    one, other = feed_of(now, ahead=False), feed_of(ahead, ahead=True)
    for step in (0, 1, 2, 3, 7, 8):  # a run that goes on begins anywhere
        (draws, features), (same_draws, same) = one.get(step), other.get(step)
        assert torch.equal(draws.noise, same_draws.noise)
        assert torch.equal(features.latent, same.latent)
        wanted = draw(5, step, range(4), SHAPE, dropout=0.1)
        assert torch.equal(draws.noise, wanted.noise)
        assert features.latent[4:].tolist() == (wanted.choice >= 0.5).astype(int).tolist()
    assert now.threads == {threading.get_ident()}
    assert threading.get_ident() not in ahead.threads
    assert len(now.asked) == 6 and len(ahead.asked) > 6  # step 4, or step 9, for nobody


def test_passes_of_a_step_are_fetched_one_after_the_other_and_other_draws_anew() -> None:
    config = CONFIG.model_copy(update={"micro_batch": 2})
    source = Recorder()
    order = WorkerOrder(SampleOrder(11, config.batch_size, config.seed), 0, 1)
    feed = Feed(config, order, source, SHAPE, ahead=True)
    assert feed.passes.count == 2
    whole = draw(5, 3, range(4), SHAPE, dropout=0.1)
    first, second = feed.get(3, 0)[0], feed.get(3, 1)[0]
    assert torch.equal(torch.cat([first.noise, second.noise]), whole.noise)
    feed.get(4, 0)
    assert len(source.asked) <= 4  # each once, and one more that is on its way
    salted = feed.get(4, 1, salt=1)[0]
    wanted = draw(5, 4, range(4), SHAPE, dropout=0.1, salt=1)
    assert torch.equal(salted.noise, wanted.noise[2:])


def test_the_next_step_is_fetched_while_this_one_is_used() -> None:
    source = Recorder()
    feed = feed_of(source, ahead=True)
    feed.get(0)
    ready = threading.Event()
    batch = source.batch

    def told(*arguments: Any) -> Features:
        ready.set()
        return batch(*arguments)

    source.batch = told  # type: ignore[method-assign]
    feed.get(1)
    assert ready.wait(5)  # step 2, which nobody has asked for


def test_an_error_comes_with_the_step_that_it_belongs_to() -> None:
    source = Recorder()
    source.broken_at = 1
    feed = feed_of(source, ahead=True)
    feed.get(0)
    with pytest.raises(InputError, match="sample 'x' is damaged"):
        feed.get(1)
