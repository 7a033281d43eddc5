from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch

from dim.learning.batch import (
    BLOCK,
    SampleOrder,
    WorkerOrder,
    choose_texts,
    draw,
    steps_per_epoch,
)

SHAPE = (4, 2, 2)


def global_batches(rows: int, batch: int, world_size: int, steps: int) -> list[list[int]]:
    order = SampleOrder(rows, batch, seed=5)
    workers = [WorkerOrder(order, rank, world_size) for rank in range(world_size)]
    return [
        sorted(int(row) for worker in workers for row in worker.rows[worker.batch(step)])
        for step in range(steps)
    ]


def test_batches_do_not_depend_on_the_number_of_workers() -> None:
    alone = global_batches(50, 6, 1, 20)
    assert alone == global_batches(50, 6, 2, 20) == global_batches(50, 6, 3, 20)


def test_batches_do_not_depend_on_where_the_walk_starts() -> None:
    order = SampleOrder(50, 6, seed=5)
    through, resumed = WorkerOrder(order, 0, 2), WorkerOrder(order, 0, 2)
    walked = [through.batch(step) for step in range(30)]
    assert all(np.array_equal(walked[step], resumed.batch(step)) for step in (17, 29, 3))


def test_an_epoch_visits_every_row_once_and_the_next_one_in_another_order() -> None:
    batches = global_batches(48, 6, 2, 16)
    first, second = batches[:8], batches[8:]
    assert sorted(chain(*first)) == sorted(chain(*second)) == list(range(48))
    assert first != second


def test_a_remainder_rests_another_one_each_epoch() -> None:
    batches = global_batches(50, 6, 1, 8 * 40)
    seen = {row for batch in batches for row in batch}
    assert all(len(set(batch)) == 6 for batch in batches)
    assert seen == set(range(50))


def test_each_worker_reads_its_own_share_only() -> None:
    order = SampleOrder(50, 6, seed=5)
    shares = [set(WorkerOrder(order, rank, 3).rows.tolist()) for rank in range(3)]
    assert set.union(*shares) == set(range(50))
    assert sum(map(len, shares)) == 50


@pytest.mark.parametrize("micro_batch", [None, 1, 2, 3, 4, 50])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 11])
def test_every_slot_counts_once_in_passes_that_are_alike_on_all_workers(
    world_size: int, micro_batch: int | None
) -> None:
    order = SampleOrder(50, 11, seed=5)
    workers = [WorkerOrder(order, rank, world_size) for rank in range(world_size)]
    cuts = [worker.passes(micro_batch) for worker in workers]
    ((count, rows),) = {(cut.count, cut.rows) for cut in cuts}
    assert rows <= (micro_batch or 11) and count * rows < -(-11 // world_size) + count
    counted = []
    for worker, cut in zip(workers, cuts, strict=True):
        for number in range(count):
            slots = np.array(worker.slots)[cut.places(number)]
            assert len(slots) == rows
            counted += slots[cut.counted(number).numpy()].tolist()
    assert sorted(counted) == list(range(11))


def test_fewer_rows_than_a_batch_repeat() -> None:
    order = SampleOrder(5, 8, seed=1)
    assert order.steps_per_epoch == steps_per_epoch(5, 8) == 1
    assert set(global_batches(5, 8, 2, 1)[0]) == set(range(5))


def test_the_seed_matters() -> None:
    walks = [WorkerOrder(SampleOrder(50, 6, seed), 0, 1) for seed in (1, 2)]
    assert walks[0].rows[walks[0].batch(0)].tolist() != walks[1].rows[walks[1].batch(0)].tolist()


def test_nothing_to_order() -> None:
    with pytest.raises(ValueError, match="no sample"):
        SampleOrder(0, 8, seed=1)


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


def test_a_salt_changes_what_is_drawn_and_none_is_the_usual_draw() -> None:
    usual = draw(3, 7, range(4), SHAPE, dropout=0.5)
    assert torch.equal(usual.noise, draw(3, 7, range(4), SHAPE, dropout=0.5, salt=0).noise)
    salted = [draw(3, 7, range(4), SHAPE, dropout=0.5, salt=salt) for salt in (1, 1, 2)]
    assert torch.equal(salted[0].noise, salted[1].noise)
    for one, other in ((usual, salted[0]), (salted[0], salted[2])):
        assert not torch.equal(one.noise, other.noise)
        assert not torch.equal(one.index, other.index)


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


def test_texts_are_chosen_by_their_shares() -> None:
    draws = np.linspace(0, 1, 1000, endpoint=False)
    assert np.bincount(choose_texts(draws, (0.9, 0.1))).tolist() == [900, 100]
    assert choose_texts(draws, (1.0,)).max() == 0


def test_a_run_that_began_before_has_the_same_batches() -> None:
    draws = draw(5, 7, range(6), SHAPE, dropout=0.4)
    assert draws.index.tolist() == [209, 552, 190, 495, 810, 302]
    assert draws.dropped.tolist() == [False, False, False, True, True, True]
    assert choose_texts(draws.choice, (0.5, 0.4, 0.1)).tolist() == [2, 1, 2, 1, 0, 0]
    assert global_batches(11, 4, 1, 4) == [[0, 1, 2, 8], [3, 4, 6, 9], [1, 2, 8, 10], [0, 5, 6, 7]]


def test_a_bad_samples_place_is_taken_by_the_next_of_its_slot() -> None:
    order = SampleOrder(50, 6, seed=5)
    alone, second = WorkerOrder(order, 0, 1), WorkerOrder(order, 1, 3)
    for step in (0, 7, 8):
        place, same = alone.at(step), second.at(step)
        assert alone.rows[place.positions()[1]] == second.rows[same.positions()[0]]
        taken = [int(alone.rows[place.positions()[1]])]
        while (following := place.instead(1, len(taken))) is not None:
            other = same.instead(0, len(taken))
            assert other is not None
            assert alone.rows[following[0]] == second.rows[other[0]]
            taken.append(int(alone.rows[following[0]]))
        assert sorted(taken) == sorted(order.shares([1])[0])  # each once, then none
    following = alone.at(0).instead(1, 1)
    assert following is not None
    assert following[0] == alone.at(1).positions()[1]  # it comes twice


WINDOWED = SampleOrder(6 * 1000, 6, seed=5, window=64)


def test_a_window_keeps_an_epoch_whole_and_is_no_matter_of_workers() -> None:
    workers = [[WorkerOrder(WINDOWED, rank, size) for rank in range(size)] for size in (1, 4)]
    seen: list[int] = []
    for step in range(1000):
        one, other = (
            sorted(int(row) for worker in some for row in worker.rows[worker.batch(step)])
            for some in workers
        )
        assert one == other
        seen += one
    assert sorted(seen) == list(range(6000))
    first, second = (WorkerOrder(WINDOWED, 0, 1).batch(step).tolist() for step in (0, 1000))
    assert first != second


def test_within_a_window_few_neighbourhoods_are_walked_at_a_time() -> None:
    def blocks(order: SampleOrder, slot: int) -> list[int]:
        worker = WorkerOrder(order, 0, 1)
        rows = [int(worker.rows[worker.batch(step)[slot]]) for step in range(1000)]
        return [len({row // BLOCK for row in rows[at : at + 64]}) for at in range(0, 936, 64)]

    for slot in range(6):
        assert max(blocks(WINDOWED, slot)) <= 3
        assert min(blocks(SampleOrder(6000, 6, seed=5), slot)) > 15
    walks = [WINDOWED.walk(0, epoch, WINDOWED.shares([0])[0]) for epoch in (0, 0, 1)]
    assert np.array_equal(walks[0], walks[1]) and not np.array_equal(walks[0], walks[2])
    # A slot mixes: neighbours in the data are seldom neighbours in time.
    share = WINDOWED.shares([0])[0]
    assert np.mean(np.abs(np.diff(share[walks[0]])) == 1) < 0.1


def test_fewer_rows_than_a_batch_repeat_within_a_window_too() -> None:
    order = SampleOrder(5, 8, seed=1, window=3)
    worker = WorkerOrder(order, 0, 1)
    assert set(worker.rows[worker.batch(0)].tolist()) == set(range(5))
