from __future__ import annotations

import torch

from dim.learning.draws import draw

SHAPE = (4, 2, 2)


def test_a_row_is_drawn_alike_whoever_draws_it() -> None:
    whole = draw(3, 7, range(6), SHAPE, dropout=0.5)
    part = draw(3, 7, range(1, 6, 2), SHAPE, dropout=0.5)
    assert torch.equal(whole.noise[1::2], part.noise)
    assert torch.equal(whole.index[1::2], part.index)
    assert torch.equal(whole.dropped[1::2], part.dropped)
    assert (whole.choice[1::2] == part.choice).all()


def test_seed_step_and_slot_each_change_the_noise() -> None:
    one = draw(3, 7, [0], SHAPE, dropout=0.1).noise
    for seed, step, slot in ((4, 7, 0), (3, 8, 0), (3, 7, 1)):
        assert not torch.equal(one, draw(seed, step, [slot], SHAPE, dropout=0.1).noise)


def test_the_distributions_are_the_papers() -> None:
    draws = draw(0, 0, range(4000), SHAPE, dropout=0.1)
    assert abs(draws.noise.mean()) < 0.02 and abs(draws.noise.std() - 1) < 0.02
    assert int(draws.index.min()) >= 0 and int(draws.index.max()) <= 999
    logits = torch.logit((draws.index + 0.5) / 1000)  # back to N(0, 1)
    assert abs(logits.mean()) < 0.05 and abs(logits.std() - 1) < 0.05
    assert abs(draws.dropped.float().mean() - 0.1) < 0.02
    assert abs(draws.choice.mean() - 0.5) < 0.02


def test_dropout_of_zero_and_one() -> None:
    assert not draw(0, 0, range(50), SHAPE, dropout=0.0).dropped.any()
    assert draw(0, 0, range(50), SHAPE, dropout=1.0).dropped.all()
