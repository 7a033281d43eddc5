from __future__ import annotations

import tracemalloc
from collections import Counter
from itertools import groupby

import numpy as np
import pytest

from dim.learning.batch import SampleOrder, WorkerOrder, times_before
from dim.learning.buckets import MOST_REPEATS, BucketOrder, steps_of_shapes
from dim.learning.config import Source
from dim.learning.mixture import mixed, samples_of


def ids_of(counts: list[int], seed: int = 0) -> np.ndarray:
    ids = np.repeat(np.arange(len(counts)), counts).astype(np.int16)
    return np.random.default_rng(seed).permutation(ids)


def global_batches(order: BucketOrder, world_size: int, steps: range) -> list[list[int]]:
    workers = [WorkerOrder(order, rank, world_size) for rank in range(world_size)]
    return [
        sorted(int(row) for worker in workers for row in worker.rows[worker.batch(step)])
        for step in steps
    ]


def some_data(seed: int) -> tuple[list[int], int, int | None]:
    """Counts of shapes with a long tail, a batch size and a window."""
    draw = np.random.default_rng(seed)
    shapes = int(draw.integers(1, 12))
    counts = (10 ** draw.uniform(0, 2.7, shapes)).astype(int).tolist()
    counts[int(draw.integers(shapes))] += 20  # enough for a batch
    counts.insert(int(draw.integers(shapes + 1)), 0)  # of a table's shapes many have no sample
    return counts, int(draw.integers(1, 20)), [None, 3, 300][int(draw.integers(3))]


@pytest.mark.parametrize("seed", range(40))
def test_an_epoch_has_every_sample_once_but_for_the_stated_rests(seed: int) -> None:
    counts, batch, window = some_data(seed)
    ids = ids_of(counts, seed)
    order = BucketOrder(ids, batch, seed, window=window)
    steps = steps_of_shapes(counts, batch)
    assert order.steps_per_epoch == steps.sum()
    assert order.shape_ids == np.flatnonzero(steps).tolist()
    for epoch in range(2):
        begin = epoch * order.steps_per_epoch
        batches = global_batches(order, 1, range(begin, begin + order.steps_per_epoch))
        assert all(len(batch_) == batch for batch_ in batches)
        shapes = [set(ids[batch_].tolist()) for batch_ in batches]
        assert all(len(one) == 1 for one in shapes)
        made = Counter(one.pop() for one in shapes)
        assert [made[number] for number in range(len(counts))] == steps.tolist()
        seen = Counter(row for batch_ in batches for row in batch_)
        for number, count in enumerate(counts):
            times = [seen[row] for row in np.flatnonzero(ids == number).tolist()]
            if not steps[number]:
                assert count * MOST_REPEATS < batch and not any(times)
            elif count < batch:  # repeated, each as often as another, or once more
                assert sum(times) == batch and max(times) - min(times) <= 1
                assert max(times) <= MOST_REPEATS
            else:
                assert max(times) == 1 and sum(times) == count - count % batch


@pytest.mark.parametrize("seed", range(8))
def test_batches_depend_neither_on_workers_nor_on_where_a_run_goes_on(seed: int) -> None:
    counts, batch, window = some_data(seed)
    order = BucketOrder(ids_of(counts), batch, seed, window=window)
    steps = range(2 * order.steps_per_epoch + 1)
    alone = global_batches(order, 1, steps)
    for world_size in {min(batch, 2), min(batch, 3), batch}:
        assert global_batches(order, world_size, steps) == alone
    again = BucketOrder(ids_of(counts), batch, seed, window=window)
    assert global_batches(again, 1, range(len(steps) - 1, len(steps))) == alone[-1:]
    middle = range(order.steps_per_epoch // 2, len(steps))
    assert global_batches(again, 1, middle) == alone[middle.start :]


def test_all_workers_have_the_same_shape_before_them_and_their_own_samples() -> None:
    ids = ids_of([400, 90, 33, 9])
    order = BucketOrder(ids, 12, 5)
    workers = [WorkerOrder(order, rank, 5) for rank in range(5)]
    for step in range(order.steps_per_epoch + 3):
        places = [worker.at(step) for worker in workers]
        (shape,) = {place.shape for place in places}
        for worker, place in zip(workers, places, strict=True):
            assert set(ids[worker.rows[place.positions()]]) == {order.shape_ids[shape]}
    owned = Counter(int(row) for worker in workers for row in worker.rows)
    assert set(owned) == set(range(len(ids)))
    assert all(owned[row] == 1 for row in np.flatnonzero(ids == 0).tolist())


def test_a_seed_and_an_epoch_give_another_schedule() -> None:
    def schedule(seed: int, epoch: int) -> list[int]:
        order = BucketOrder(ids_of([200, 100, 50]), 5, seed)
        first = epoch * order.steps_per_epoch
        turns = [order.turn(step) for step in range(first, first + order.steps_per_epoch)]
        assert {turn.epoch for turn in turns} == {epoch}
        return [turn.shape for turn in turns]

    plain = schedule(1, 0)
    assert plain == schedule(1, 0)
    assert plain != schedule(2, 0) and plain != schedule(1, 1)
    assert Counter(plain) == Counter(schedule(1, 1)) == {0: 40, 1: 20, 2: 10}


@pytest.mark.parametrize("seed", range(10))
def test_the_steps_of_a_shape_are_spread_over_the_epoch(seed: int) -> None:
    counts = [7000, 3000, 2500, 900, 300, 40, 10]
    order = BucketOrder(ids_of(counts), 10, seed)
    shapes = np.array([order.turn(step).shape for step in range(order.steps_per_epoch)])
    for shape, count in enumerate(counts):
        share = count / sum(counts)
        for width in (50, 200):
            found = np.convolve(shapes == shape, np.ones(width), "valid")
            # Each shape is one step early or late at most, so in their sum few are.
            assert np.abs(found - width * share).max() <= 2 + len(counts) * share
        if share < 0.5:
            runs = [len(list(run)) for found, run in groupby(shapes) if found == shape]
            assert max(runs) <= 6


def test_another_remainder_rests_in_each_epoch() -> None:
    ids = ids_of([57, 31])
    order = BucketOrder(ids, 8, 3)
    seen: Counter[int] = Counter()
    epochs = 60
    for batch in global_batches(order, 1, range(epochs * order.steps_per_epoch)):
        seen.update(batch)
    assert len(seen) == 88
    assert min(seen.values()) > epochs * 0.5


def test_few_samples_fill_a_batch_and_fewer_are_left_out() -> None:
    assert steps_of_shapes([0, 1, 63, 64, 255, 256, 511, 512], 256).tolist() == [
        *(0, 0, 0, 1, 1, 1, 1, 2)
    ]
    assert steps_of_shapes([1, 2], 4).tolist() == [1, 1]
    with pytest.raises(ValueError, match="no shape has samples enough"):
        BucketOrder(ids_of([3, 3]), 16, 0)


def test_a_slot_with_one_sample_of_a_shape_may_take_others_in_place_of_a_bad_one() -> None:
    ids = ids_of([100, 9, 3])
    order = BucketOrder(ids, 8, 5)
    alone, second = WorkerOrder(order, 0, 1), WorkerOrder(order, 1, 4)
    for shape, most in ((1, 4), (2, 3)):
        place, same = alone.beginning(shape), second.beginning(shape)
        taken = [int(alone.rows[place.positions()[5]])]
        other = [int(second.rows[same.positions()[1]])]  # slots 1 and 5 are the second's
        while (following := place.instead(5, len(taken))) is not None:
            taken.append(int(alone.rows[following[0]]))
        while (following := same.instead(1, len(other))) is not None:
            other.append(int(second.rows[following[0]]))
        assert taken == other
        assert len(set(taken)) == len(taken) == most
        assert set(ids[taken].tolist()) == {order.shape_ids[shape]}


@pytest.mark.parametrize("window", [None, 16])
def test_rows_that_stand_twice_among_the_samples_come_twice(window: int | None) -> None:
    ids = ids_of([600, 300])
    samples = np.concatenate([np.arange(0, 900), np.arange(100, 200), np.arange(100, 200)])
    wanted = Counter(samples.tolist())
    whole = SampleOrder(900, 1, 5, window=window, samples=samples)
    worker = WorkerOrder(whole, 0, 1)
    assert Counter(int(worker.rows[worker.batch(s)][0]) for s in range(1100)) == wanted
    order = BucketOrder(ids, 1, 5, window=window, samples=samples)
    assert order.steps_per_epoch == 1100 and order.rows == 900
    batches = global_batches(order, 1, range(1100))
    assert Counter(row for (row,) in batches) == wanted


def test_copies_of_a_row_are_apart_within_a_window() -> None:
    rows = 40 * 256
    samples = np.concatenate([np.random.default_rng(n).permutation(40) for n in range(3)])
    samples = (samples[:, None] * 256 + np.arange(256)).ravel()  # block after block, three times
    order = SampleOrder(rows, 2, 5, window=64, samples=samples)
    worker = WorkerOrder(order, 0, 1)
    near = 0
    for slot in range(2):
        walked = np.array([worker.rows[worker.batch(s)[slot]] for s in range(len(samples) // 2)])
        steps = np.arange(len(walked))
        by_row = np.lexsort((steps, walked))
        same = np.diff(walked[by_row]) == 0
        near += int((np.diff(steps[by_row])[same] < 2 * 256).sum())
    assert near < len(samples) * 0.05


def weighted(
    ids: np.ndarray, rows: list[int], weights: list[float], batch: int, window: int | None = None
) -> tuple[BucketOrder, np.ndarray]:
    """The order of sources that have ``rows`` samples each, and the rows that an epoch walks."""
    sources = [Source(uri=f"data/{n}", weight=weight) for n, weight in enumerate(weights)]
    counts = samples_of(sources, [source.uri for source in sources], rows, batch)
    samples = mixed(sources, rows, counts, 5, window=window)
    assert samples is not None
    ends = np.cumsum(rows).tolist()
    return BucketOrder(ids, batch, 5, window=window, samples=samples, ends=ends), samples


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("seed", range(6))
def test_weighted_sources_have_their_part_of_each_shape_in_an_epoch(
    seed: int, window: int | None
) -> None:
    draw = np.random.default_rng(seed)
    rows, batch = [int(draw.integers(200, 900)), int(draw.integers(40, 200))], 8
    parts = [draw.choice(4, count, p=draw.dirichlet(np.ones(4))) for count in rows]
    ids = np.concatenate(parts).astype(np.int16)
    order, samples = weighted(ids, rows, [1.0, float(draw.uniform(0.3, 3))], batch, window)
    there = np.bincount(ids[samples], minlength=4)
    steps = steps_of_shapes(there, batch)
    assert order.steps_per_epoch == steps.sum()
    wanted, may_differ = np.zeros(2), 0
    for shape in order.shape_ids:
        of_shape = samples[ids[samples] == shape]
        share = np.array([(of_shape < rows[0]).mean(), (of_shape >= rows[0]).mean()])
        wanted += share * steps[shape] * batch
        may_differ += 2 if there[shape] >= batch else there[shape]
    often = Counter(samples.tolist())
    for epoch in range(2):
        begin = epoch * order.steps_per_epoch
        batches = global_batches(order, 1, range(begin, begin + order.steps_per_epoch))
        assert all(len(set(ids[taken].tolist())) == 1 for taken in batches)
        seen = Counter(row for taken in batches for row in taken)
        first = sum(count for row, count in seen.items() if row < rows[0])
        found = np.array([first, seen.total() - first])
        assert np.abs(found - wanted).max() <= may_differ
        full = {shape for shape in order.shape_ids if there[shape] >= batch}
        assert all(seen[row] <= often[row] for row in seen if int(ids[row]) in full)


def test_weights_are_the_shares_of_an_epoch_of_many_shapes_to_a_hundredth() -> None:
    rows, shapes = [40_000, 9_000], 30
    likely = np.geomspace(1, 1e-3, shapes)
    ids = np.random.default_rng(0).choice(shapes, sum(rows), p=likely / likely.sum())
    order, _ = weighted(ids.astype(np.int16), rows, [0.7, 0.3], 32)
    steps = range(order.steps_per_epoch)
    batches = global_batches(order, 1, steps)
    share = np.mean([row < rows[0] for taken in batches for row in taken])
    assert share == pytest.approx(0.7, rel=0.01)
    for world_size in (3, 32):
        assert global_batches(order, world_size, steps[500:540]) == batches[500:540]
    near = [np.mean(np.array(batches[at : at + 300]) < rows[0]) for at in steps[:-300:200]]
    assert near == pytest.approx([0.7] * len(near), abs=0.02)


@pytest.mark.parametrize("repeats", [1, 2])
def test_an_order_of_a_million_samples_of_many_shapes_is_small(
    repeats: int, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = 1_000_000 // repeats
    ids = np.random.default_rng(0).integers(0, 33, rows).astype(np.int16)
    tracemalloc.start()
    samples = None if repeats == 1 else np.repeat(np.arange(rows), repeats)
    order = BucketOrder(ids, 256, 5, window=256, samples=samples, ends=[rows])
    del samples
    worker = WorkerOrder(order, 3, 32)
    most = tracemalloc.get_traced_memory()[1] / 1_000_000
    del order
    own = len(worker._positions)  # type: ignore[arg-type]
    held = tracemalloc.get_traced_memory()[0] / own
    for shape in range(33):
        worker.beginning(shape)
    walking = tracemalloc.get_traced_memory()[0] / own
    tracemalloc.stop()
    with capsys.disabled():
        print(
            f"\neach row {repeats} times: {most:.0f} bytes a sample of an epoch meanwhile, then "
            f"{held:.0f} a sample of the worker's share, {walking:.0f} with its walks"
        )
    assert most < 36 and held < 27 and walking < 36


def test_a_slot_of_few_rows_that_repeat_may_take_others_too() -> None:
    ids = ids_of([400, 2])
    order = BucketOrder(ids, 4, 5, samples=np.concatenate([[7] * 40, np.arange(400)]))
    worker = WorkerOrder(order, 0, 1)
    assert len(worker.rows) == len(set(worker.rows.tolist()))
    place = worker.beginning(0)
    copies = order.shares([0])[0]
    assert len(set(copies.tolist())) >= 4 and set(ids[copies]) == {ids[copies[0]]}
    taken = {int(worker.rows[place.positions()[0]])}
    tries = 0
    while (following := place.instead(0, tries := tries + 1)) is not None:
        taken.add(int(worker.rows[following[0]]))
    assert taken == set(copies.tolist())


def test_a_slot_owns_neighbours_of_the_samples_that_are_given() -> None:
    samples = np.arange(40)[::-1] % 15
    order = SampleOrder(15, 4, 7, samples=samples)
    assert np.array_equal(np.concatenate(order.shares(range(4))), samples)
    assert np.array_equal(order.shares([2])[0], samples[20:30])
    light = order.without_samples()
    for slot in range(4):
        share = order.shares([slot])[0]
        assert np.array_equal(light.walk(slot, 3, share), order.walk(slot, 3, share))
    assert np.array_equal(times_before(np.array([3, 1, 3, 3, 1])), [0, 0, 1, 2, 1])


def test_within_a_window_the_shapes_of_a_slot_walk_through_the_same_rows() -> None:
    rows, slots = 60_000, 4
    ids = np.random.default_rng(0).choice(5, rows, p=[0.4, 0.3, 0.15, 0.1, 0.05]).astype(np.int16)
    blocks = []
    for order in (
        BucketOrder(ids, slots, 5, window=256),
        BucketOrder(ids, slots, 5),
    ):
        worker = WorkerOrder(order, 0, 1)
        walked = [int(worker.rows[worker.batch(step)[1]]) for step in range(order.steps_per_epoch)]
        found = [len({row // 256 for row in walked[at : at + 256]}) for at in range(0, 14_000, 256)]
        blocks.append(np.mean(found))
    assert blocks[0] < 6 and blocks[1] > 100  # drawn for each shape alone: 8.7
