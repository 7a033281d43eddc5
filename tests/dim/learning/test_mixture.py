from __future__ import annotations

import tracemalloc
from collections import Counter
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from dim.config import dump_config, validate_config
from dim.errors import ConfigError, InputError
from dim.learning.batch import BLOCK, SampleOrder, WorkerOrder
from dim.learning.config import Source, StageInputs
from dim.learning.mixture import MOST, mixed, samples_of


def sources(*settings: dict[str, Any]) -> list[Source]:
    return [Source(uri=f"data/{number}", **some) for number, some in enumerate(settings)]


def order_of(
    some: list[Source], rows: list[int], batch: int, *, window: int | None = None, seed: int = 5
) -> SampleOrder:
    counts = samples_of(some, [source.uri for source in some], rows, batch)
    samples = mixed(some, rows, counts, seed, window=window)
    ends = [] if samples is None else np.cumsum(rows).tolist()
    return SampleOrder(sum(rows), batch, seed, window=window, samples=samples, ends=ends)


def rows_of(order: SampleOrder, steps: range, world_size: int = 1) -> NDArray[np.int64]:
    """(steps, batch): the rows of each global batch, sorted."""
    workers = [WorkerOrder(order, rank, world_size) for rank in range(world_size)]
    batches = [
        np.sort(np.concatenate([worker.rows[worker.batch(step)] for worker in workers]))
        for step in steps
    ]
    return np.array(batches)


def shares_of(batches: NDArray[np.int64], rows: list[int]) -> NDArray[np.float64]:
    source = np.searchsorted(np.cumsum(rows), batches.ravel(), side="right")
    return np.bincount(source, minlength=len(rows)) / batches.size


WEIGHTS = [
    ([1.0, 1.0], [6000, 700], 32),
    ([0.7, 0.2, 0.1], [1000, 3000, 11], 8),
    ([2.0, 1.0], [997, 1013], 24),
    ([1.0, 3.0], [40, 4], 3),
]


@pytest.mark.parametrize("window", [None, 256])
@pytest.mark.parametrize(("weights", "rows", "batch"), WEIGHTS)
def test_weights_are_the_shares_of_an_epoch_and_of_a_few_hundred_steps(
    weights: list[float], rows: list[int], batch: int, window: int | None
) -> None:
    order = order_of(sources(*({"weight": w} for w in weights)), rows, batch, window=window)
    wanted = np.array(weights) / sum(weights)
    for epoch in range(2):
        begin = epoch * order.steps_per_epoch
        batches = rows_of(order, range(begin, begin + order.steps_per_epoch))
        assert shares_of(batches, rows) == pytest.approx(wanted, rel=0.01)
        assert set(batches.ravel().tolist()) == set(range(sum(rows)))
        for at in range(0, len(batches) - 300, 150):
            assert shares_of(batches[at : at + 300], rows) == pytest.approx(wanted, abs=0.02)


@pytest.mark.parametrize("window", [None, 64])
def test_repeats_are_exact_and_a_fraction_is_always_the_same_part(window: int | None) -> None:
    rows = [600, 1000, 50]
    some = sources({"repeats": 1.5}, {"repeats": 0.25}, {})
    order = order_of(some, rows, 10, window=window)
    assert order.steps_per_epoch == (900 + 250 + 50) // 10
    epochs = [
        Counter(rows_of(order, range(at * 120, at * 120 + 120)).ravel().tolist()) for at in (0, 1)
    ]
    assert epochs[0] == epochs[1]
    counts = np.array([epochs[0][row] for row in range(1650)])
    assert Counter(counts[:600].tolist()) == {1: 300, 2: 300}
    assert Counter(counts[600:1600].tolist()) == {0: 750, 1: 250}
    assert set(counts[1600:].tolist()) == {1}
    # A part of them all and not the first ones: as many of either half, within five deviations.
    assert abs(int((counts[:300] == 2).sum()) - 150) < 45 or window is not None
    other = rows_of(order_of(some, rows, 10, window=window, seed=6), range(120))
    assert Counter(other.ravel().tolist()) != epochs[0]


@pytest.mark.parametrize("window", [None, 64])
def test_a_cap_leaves_so_many_samples_before_anything_else(window: int | None) -> None:
    some = sources({"cap": 300, "repeats": 3}, {"cap": 10_000})
    order = order_of(some, [5000, 600], 20, window=window)
    assert order.steps_per_epoch == (900 + 600) // 20
    counts = Counter(rows_of(order, range(75)).ravel().tolist())
    capped = {row: count for row, count in counts.items() if row < 5000}
    assert len(capped) == 300 and set(capped.values()) == {3}
    assert max(capped) - min(capped) > 2500
    assert all(counts[row] == 1 for row in range(5000, 5600))
    if window is not None:  # whole runs of neighbours, or each would be a row group of its own
        assert len({row // BLOCK for row in capped}) <= 300 // BLOCK + 2


def test_mixed_batches_depend_neither_on_workers_nor_on_where_the_walk_starts() -> None:
    some, rows = sources({"weight": 1}, {"weight": 2}), [500, 90]
    for window in (None, 16):
        order = order_of(some, rows, 12, window=window)
        whole = rows_of(order, range(200))
        for world_size in (2, 5):
            assert np.array_equal(rows_of(order, range(200), world_size), whole)
        assert np.array_equal(rows_of(order, range(150, 160)), whole[150:160])
        first, second = whole[: order.steps_per_epoch], whole[order.steps_per_epoch :]
        assert not np.array_equal(first[: len(second)], second)


def test_a_worker_needs_each_row_once_however_often_it_comes() -> None:
    some, rows = sources({"repeats": 7}, {}), [300, 100]
    order = order_of(some, rows, 16)
    workers = [WorkerOrder(order, rank, 4) for rank in range(4)]
    assert all(len(worker.rows) == len(set(worker.rows.tolist())) for worker in workers)
    # Repetitions are neighbours, and so in one slot: but for those at its ends, in one worker.
    assert 400 <= sum(len(worker.rows) for worker in workers) <= 400 + 16
    alone = WorkerOrder(order, 0, 1)
    place = alone.at(0)
    taken = [int(alone.rows[place.positions()[0]])]
    while (following := place.instead(0, len(taken))) is not None:
        taken.append(int(alone.rows[following[0]]))
    assert sorted(taken) == sorted(order.shares([0])[0].tolist())  # the slot's own, then none


def test_an_order_of_millions_is_small(capsys: pytest.CaptureFixture[str]) -> None:
    some, rows = sources({"weight": 1}, {"weight": 1}), [1_400_000, 690_000]
    for window in (None, 256):
        tracemalloc.start()
        order = order_of(some, rows, 256, window=window)
        worker = WorkerOrder(order, 3, 32)
        most = tracemalloc.get_traced_memory()[1]
        total, own = len(order.samples), len(worker._positions)  # type: ignore[arg-type]
        del order
        held = tracemalloc.get_traced_memory()[0]
        worker.batch(0)
        walks = tracemalloc.get_traced_memory()[0] - held
        tracemalloc.stop()
        assert total == 2_800_128 and own == total // 32
        with capsys.disabled():
            print(
                f"\nwindow {window}: {most / total:.0f} bytes a sample of an epoch meanwhile, then "
                f"{held / own:.0f} a sample of the worker's share, {walks / own:.0f} for its walks"
            )
        assert most < 17 * total and held < 25 * own and walks < 9 * own


def test_few_mixed_samples_repeat_in_a_batch() -> None:
    order = order_of(sources({"repeats": 2}, {}), [2, 1], 8)
    batches = rows_of(order, range(2))
    assert order.steps_per_epoch == 1 and set(batches.ravel().tolist()) == {0, 1, 2}


def test_without_anything_to_mix_the_order_is_the_usual_one() -> None:
    plain = sources({}, {"repeats": 1.0, "name": "other"})
    assert samples_of(plain, ["a", "b"], [30, 0], 4) == [30, 0]
    assert mixed(plain, [30, 20], [30, 20], 5) is None
    usual, order = SampleOrder(50, 6, 5), order_of(plain, [30, 20], 6)
    assert np.array_equal(rows_of(usual, range(20)), rows_of(order, range(20)))


@pytest.mark.parametrize(
    ("settings", "rows", "said"),
    [
        ([{"weight": 1}, {"weight": 2}], [0, 5], "first has no sample to mix"),
        ([{"repeats": 0.01}, {}], [40, 5], "repeats: 0.01 of the 40 samples of first is none"),
        (
            [{"weight": 1}, {"weight": 99}],
            [14_000_000, 5],
            f"first has 14,000,000 samples and 0.01 of the weight, .* and {MOST:,} are allowed",
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    settings: list[dict[str, Any]], rows: list[int], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        samples_of(sources(*settings), ["first", "second"], rows, 4)


def inputs(*data: Any) -> StageInputs:
    values = {"stage": "t2i", "init": "i", "data": list(data)}
    return validate_config(StageInputs, values, where="stage.yaml")


def test_sources_are_addresses_or_say_more() -> None:
    stage = inputs("runs/a/data", {"uri": "s3://b/c?region=x", "repeats": 2}, {"uri": "d"})
    assert stage.uris == ["runs/a/data", "s3://b/c?region=x", "d"]
    dumped = dump_config(stage)
    assert dumped["data"] == ["runs/a/data", {"uri": "s3://b/c?region=x", "repeats": 2.0}, "d"]
    assert validate_config(StageInputs, dumped, where="again") == stage


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["s3://dim/data/t2i"], ["t2i"]),
        (["runs/a/data/", "runs/b/data"], ["a-data", "b-data"]),
        (["/x/one two", "s3://bucket?endpoint_override=http://h:1"], ["one_two", "bucket"]),
        (["s3://one/data", "s3://two/data"], ["data-1", "data-2"]),
    ],
)
def test_a_source_is_called_by_what_tells_its_address_apart(
    uris: list[str], names: list[str]
) -> None:
    assert inputs(*uris).source_names == names
    assert inputs({"uri": "x", "name": "mine"}, *uris).source_names == ["mine", *names]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (["a", {"uri": "b", "wieght": 1}], "unknown key 'data.1.wieght'"),
        (["a", {"uri": "b", "weight": 1}], "a has no weight and others have"),
        ([{"uri": "b", "weight": 1, "repeats": 2}], "b has a weight and repeats"),
        ([{"uri": "b", "weight": 0}], "'data.0.weight': Input should be greater than 0"),
        ([{"uri": "b", "cap": 0}], "'data.0.cap'"),
        ([{"uri": "b", "name": "a b"}], "'data.0.name'"),
        (["a/x", {"uri": "b", "name": "x"}], "2 sources are called 'x'"),
        (["a/sigma_q1", "b"], "'sigma_q1' is no name for a source"),
    ],
)
def test_a_wrong_source_is_an_error_that_names_it(data: list[Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inputs(*data)
