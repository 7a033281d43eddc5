from __future__ import annotations

from itertools import chain

import numpy as np
import pytest

from dim.learning.order import SampleOrder, WorkerOrder


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


def test_fewer_rows_than_a_batch_repeat() -> None:
    order = SampleOrder(5, 8, seed=1)
    assert order.steps_per_epoch == 1
    assert set(global_batches(5, 8, 2, 1)[0]) == set(range(5))


def test_the_seed_matters() -> None:
    walks = [WorkerOrder(SampleOrder(50, 6, seed), 0, 1) for seed in (1, 2)]
    assert walks[0].rows[walks[0].batch(0)].tolist() != walks[1].rows[walks[1].batch(0)].tolist()


def test_nothing_to_order() -> None:
    with pytest.raises(ValueError, match="no sample"):
        SampleOrder(0, 8, seed=1)
