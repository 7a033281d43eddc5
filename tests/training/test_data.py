from __future__ import annotations

import json
import threading
import time
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dim import model as models
from dim.errors import InputError, SampleError, StorageError
from dim.features import row_groups
from dim.features.encoder import CachedFeatures, Features, FrozenEncoder, LiveFeatures
from dim.features.shards import Share
from dim.learning.batch import SampleOrder, WorkerOrder, draw
from dim.learning.buckets import BucketOrder
from dim.learning.config import Source
from dim.learning.mixture import mixed, samples_of
from infra.samples import open_images
from training.data import Feed, hold_groups, make_feed
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
    return Feed(CONFIG, order, source, [SHAPE], rows=11, ahead=ahead)


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


def test_passes_of_a_step_are_fetched_together_and_other_draws_anew() -> None:
    config = CONFIG.model_copy(update={"micro_batch": 2})
    source = Recorder()
    order = WorkerOrder(SampleOrder(11, config.batch_size, config.seed), 0, 1)
    feed = Feed(config, order, source, [SHAPE], rows=11, ahead=1)
    assert feed.passes.count == 2
    whole = draw(5, 3, range(4), SHAPE, dropout=0.1)
    first, second = feed.get(3, 0)[0], feed.get(3, 1)[0]
    assert torch.equal(torch.cat([first.noise, second.noise]), whole.noise)
    feed.get(4, 0)
    assert len(source.asked) <= 3  # steps 3 and 4 once each, and one more that is on its way
    salted = feed.get(4, 1, salt=1)[0]
    wanted = draw(5, 4, range(4), SHAPE, dropout=0.1, salt=1)
    assert torch.equal(salted.noise, wanted.noise[2:])


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


def test_waiting_for_samples_is_counted_and_given_out_once() -> None:
    source = Recorder()
    fetch = source.fetch

    def slowly(positions: np.ndarray, texts: np.ndarray) -> list[tuple[int, int]]:
        time.sleep(0.2)
        return fetch(positions, texts)

    source.fetch = slowly  # type: ignore[method-assign]
    feed = feed_of(source, ahead=1)
    feed.get(0)
    assert feed.take_wait() > 0.19 and feed.take_wait() == 0
    time.sleep(0.5)  # the next one is fetched meanwhile
    feed.get(1)
    assert feed.take_wait() < 0.15


def test_an_error_comes_with_the_step_that_it_belongs_to() -> None:
    source = Recorder()
    source.broken_at = 1
    feed = feed_of(source, ahead=1)
    feed.get(0)
    with pytest.raises(StorageError, match="the store is away"):
        feed.get(1)


class Flawed(Recorder):
    """Samples of which those in ``bad`` cannot be used."""

    def __init__(self, bad: set[int]) -> None:
        super().__init__()
        self.bad = bad

    def fetch(self, positions: np.ndarray, texts: np.ndarray) -> list[Any]:
        found: list[Any] = super().fetch(positions, texts)
        for place, (position, _) in enumerate(found):
            if position in self.bad:
                found[place] = SampleError(f"sample {position} is damaged", "undecodable")
        return found


def taken(feed: Feed, step: int) -> list[int]:
    return feed.get(step)[1].latent[:, 0].tolist()


def test_a_bad_sample_is_replaced_by_its_slots_next_one_and_nothing_else_changes() -> None:
    good = feed_of(Recorder(), ahead=0)
    order = WorkerOrder(SampleOrder(11, 4, CONFIG.seed), 0, 1)
    bad = set(order.at(1).positions()[[0, 2]].tolist())
    through = feed_of(Flawed(bad), ahead=2)
    for step in range(6):
        usual, replaced = taken(good, step), taken(through, step)
        draws = [feed.get(step)[0] for feed in (good, through)]
        assert torch.equal(draws[0].noise, draws[1].noise)
        for slot, (was, now) in enumerate(zip(usual, replaced, strict=True)):
            expected, tries = was, 0
            while expected in bad:
                tries += 1
                following = order.at(step).instead(slot, tries)
                assert following is not None
                expected = int(following[0])
            assert now == expected and now not in bad
    assert through.bad._bad["undecodable"] >= 2
    # A run that goes on in the middle takes the same, though it never saw what came before.
    resumed = feed_of(Flawed(bad), ahead=1)
    assert [taken(resumed, step) for step in (4, 5)] == [taken(through, step) for step in (4, 5)]


def test_the_source_of_each_sample_is_that_of_what_was_taken() -> None:
    config = CONFIG.model_copy(update={"micro_batch": 2})
    order = WorkerOrder(SampleOrder(11, 4, CONFIG.seed), 0, 1)
    ends = [3, 8, 11]
    feed = Feed(config, order, Flawed({2, 9}), [SHAPE], rows=11, ahead=1, ends=ends)
    seen = set()
    for step in range(6):
        for number in range(feed.passes.count):
            positions = feed.get(step, number)[1].latent[:, 0].numpy()
            sources = feed.sources(number).tolist()
            assert sources == [sum(row >= end for end in ends) for row in order.rows[positions]]
            seen.update(sources)
    assert seen == {0, 1, 2}
    plain = feed_of(Recorder(), ahead=0)
    plain.get(0)
    assert plain.sources().tolist() == [0, 0, 0, 0]


def test_what_is_fetched_and_not_used_is_not_counted() -> None:
    order = WorkerOrder(SampleOrder(11, 4, CONFIG.seed), 0, 1)
    feed = feed_of(Flawed({int(order.batch(1)[0])}), ahead=1)
    feed.get(0)
    feed._coming[1, 0].result(5)
    assert feed.bad._bad.total() == 0
    feed.get(1)
    feed.get(1)
    assert feed.bad._bad.total() == 1 and feed.bad._used == 8


def test_a_slot_without_a_usable_sample_is_an_error() -> None:
    order = WorkerOrder(SampleOrder(11, 4, CONFIG.seed), 0, 1)
    walk = order.at(0).walks[2].tolist()
    with pytest.raises(InputError, match=rf"has {len(walk)} samples and none can be used"):
        feed_of(Flawed(set(walk)), ahead=0).get(0)
    with pytest.raises(InputError, match="a smaller batch_size"):
        make_feed(CONFIG, order, Flawed(set(walk)))


def test_a_step_may_be_taken_in_passes_and_is_fetched_once() -> None:
    source = Recorder()
    draws, features = feed_of(source, ahead=0).get(3)
    config = CONFIG.model_copy(update={"micro_batch": 3})
    order = WorkerOrder(SampleOrder(11, config.batch_size, config.seed), 0, 1)
    feed = Feed(config, order, source, [SHAPE], rows=11, ahead=0)
    passes = [[0, 1], [2, 3]]
    for number, places in enumerate(passes):
        part, rows = feed.get(3, number)
        assert torch.equal(part.noise, draws.noise[places])
        assert part.dropped.tolist() == draws.dropped[places].tolist()
        assert part.choice.tolist() == draws.choice[places].tolist()
        assert torch.equal(rows.latent, features.latent[places])
    assert len(source.asked) == 2  # once by each feed


SHAPES = [(2, 3, 3), (2, 2, 4), (2, 4, 2)]  # of the noise of shapes 0, 1 and 2
IDS = np.array([0] * 11 + [1] * 9 + [2] * 3, np.int16)


class Shaped(Flawed):
    """Samples whose latents have the shapes that ``IDS`` says."""

    def __init__(self, bad: set[int], order: WorkerOrder) -> None:
        super().__init__(bad)
        self.rows = order.rows

    def collate(self, fetched: list[tuple[int, int]]) -> Features:
        rows = self.rows[[position for position, _ in fetched]]
        (shape,) = set(IDS[rows].tolist())  # all are of one
        latent = torch.zeros(len(rows), *SHAPES[shape])
        latent[:, 0, 0, 0] = torch.from_numpy(rows)
        return Features(latent, latent, latent, None)


def shaped(bad: Iterable[int] = ()) -> tuple[Feed, WorkerOrder, Shaped]:
    order = WorkerOrder(BucketOrder(IDS, CONFIG.batch_size, CONFIG.seed), 0, 1)
    source = Shaped(set(bad), order)
    return make_feed(CONFIG, order, source), order, source


def test_noise_has_the_shape_of_the_step_and_depends_on_nothing_else() -> None:
    feed, order, _ = shaped()
    assert feed._latent_shapes == SHAPES
    met = set()
    for step in range(order.shapes + 5):
        draws, features = feed.get(step)
        shape = SHAPES[order.at(step).shape]
        met.add(shape)
        assert draws.noise.shape == features.latent.shape == (4, *shape)
        wanted = draw(5, step, range(4), shape, dropout=0.1)
        assert torch.equal(draws.noise, wanted.noise) and torch.equal(draws.index, wanted.index)
        assert IDS[features.latent[:, 0, 0, 0].long()].tolist() == [order.at(step).shape] * 4
    assert met == set(SHAPES)


def test_a_bad_sample_is_replaced_by_one_of_its_shape() -> None:
    _, order, _ = shaped()
    rare = next(step for step in range(9) if order.at(step).shape == 2)
    row = int(order.rows[order.at(rare).positions()[0]])  # the only one that its slot owns
    feed, _, _ = shaped(np.flatnonzero(order.rows == row).tolist())
    taken = feed.get(rare)[1].latent[:, 0, 0, 0].tolist()
    assert row not in taken and set(taken) < {20, 21, 22}
    assert feed.bad._bad["undecodable"] >= 1


def test_a_shape_without_a_usable_sample_is_found_before_the_first_step() -> None:
    _, order, source = shaped()
    assert [len(asked) for asked in source.asked] == [8, 8, 8]  # a sample a slot and shape
    bad = np.flatnonzero(np.isin(order.rows, [20, 21, 22]))
    with pytest.raises(InputError, match="has 3 samples and none can be used"):
        shaped(bad.tolist())


def write_images(folder: Path, rows: int, size: int = 20_000) -> str:
    """Images that take ``size`` bytes each, in row groups of 8."""
    noise = np.random.default_rng(0)
    schema = pa.schema(
        [("id", pa.string()), ("image", pa.large_binary()), ("caption", pa.string())]
    )
    table = pa.Table.from_pylist(
        [{"id": f"{n}", "image": noise.bytes(size), "caption": "c"} for n in range(rows)], schema
    )
    (folder / "data").mkdir(parents=True)
    files = []
    for first in range(0, rows, 40):
        path = folder / "data" / f"part-{first:05d}.parquet"
        pq.write_table(table.slice(first, 40), path, row_group_size=8)
        length = path.stat().st_size
        entry = {"path": f"data/{path.name}", "rows": min(40, rows - first), "bytes": length}
        files.append(entry | {"sha256": ""})
    (folder / "manifest.json").write_text(json.dumps({"files": files}))
    return str(folder)


class Undecoded:
    """Live features without frozen parts: what a worker reads and holds of images is the same."""

    def __init__(self, share: Share) -> None:
        self._share = share

    def fetch(self, positions: np.ndarray, texts: np.ndarray) -> list[Any]:
        return self._share.fetch(positions)

    def collate(self, fetched: list[Any]) -> Features:
        told = torch.tensor([int(row["id"]) for row in fetched])
        return Features(told, told, told, None)


@pytest.mark.parametrize("window", [None, 8])
def test_a_worker_holds_and_reads_no_more_when_data_grow_tenfold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: int | None
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups

    def counted(self: Any, groups: list[int], **options: Any) -> Any:
        table = plain(self, groups, **options)
        read.append(table.nbytes)
        return table

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", counted)
    monkeypatch.setattr(row_groups, "_FOOTERS", 4)
    most: dict[int, int] = {}
    count: dict[int, int] = {}
    config = CONFIG.model_copy(update={"shuffle_window": window, "cache_features": False})
    for rows in (200, 2000):
        uri = write_images(tmp_path / str(rows), rows)
        images = open_images([uri], ["id", "image", "caption"], every_file=False)
        order = WorkerOrder(SampleOrder(rows, 4, 5, window=window), 0, 1)
        hold_groups(config, order, images.groups)
        feed = Feed(
            config, order, Undecoded(Share(images, order.rows)), [SHAPE], rows=rows, ahead=2
        )
        read.clear()
        before = pa.total_allocated_bytes()
        tracemalloc.start()
        for step in range(40):
            feed.get(step)
        for future in feed._coming.values():
            future.result(5)
        feed.get(40)
        (held, peak), arrow = tracemalloc.get_traced_memory(), pa.total_allocated_bytes() - before
        tracemalloc.stop()
        most[rows], count[rows] = max(held, peak) + arrow, len(read)
    assert most[2000] < 1.6 * most[200] and most[2000] < 2000 * 20_000 / 10
    if window is None:
        assert 40 * 4 <= count[2000] <= 43 * 4 and count[200] <= 43 * 4  # a group a sample
    else:
        assert count[2000] <= 43 * 4 / 2  # 8 samples a group, less what has only begun


def test_within_a_window_a_row_group_is_read_about_once_an_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **options: (read.extend(groups), plain(self, groups, **options))[1],
    )
    uri = write_images(tmp_path / "images", 2000)
    images = open_images([uri], ["id", "image", "caption"])
    config = CONFIG.model_copy(update={"shuffle_window": 16, "cache_features": False})
    order = WorkerOrder(SampleOrder(2000, 4, 5, window=16), 0, 1)
    hold_groups(config, order, images.groups)
    feed = Feed(config, order, Undecoded(Share(images, order.rows)), [SHAPE], rows=2000, ahead=2)
    seen = [row for step in range(500) for row in feed.get(step)[1].latent.tolist()]
    assert sorted(seen) == list(range(2000))
    assert 250 <= len(read) <= 250 * 1.15  # runs of 256 do not end where row groups of 8 do
    assert images.groups.held.nbytes <= images.groups.held.rows * 21_000


def test_within_a_window_shapes_share_row_groups_and_what_is_held_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **options: (read.extend(groups), plain(self, groups, **options))[1],
    )
    uri = write_images(tmp_path / "images", 8000, size=100)
    config = CONFIG.model_copy(update={"shuffle_window": 16, "cache_features": False})
    ids = np.random.default_rng(0).choice(3, 8000, p=[0.5, 0.3, 0.2]).astype(np.int16)
    order = WorkerOrder(BucketOrder(ids, 4, 5, window=16), 0, 1)
    images = open_images([uri], ["id", "image", "caption"])
    hold_groups(config, order, images.groups)
    shapes = [SHAPE] * 3
    share = Share(images, order.rows)
    feed = Feed(config, order, Undecoded(share), shapes, rows=8000, ahead=2)
    steps = sum(count // 4 for count in np.bincount(ids).tolist())
    seen = [row for step in range(steps) for row in feed.get(step)[1].latent.tolist()]
    assert len(set(seen)) == len(seen) == 4 * steps >= 7990
    assert len(read) <= 1000 * 3  # of 1,000 row groups; each sample by itself would be 8,000
    assert images.groups.held.rows == 4 * (16 + 2 * 3 * 2 * 8)


def test_within_a_window_the_shapes_of_mixed_sources_share_row_groups_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    plain = pq.ParquetFile.read_row_groups
    monkeypatch.setattr(
        pq.ParquetFile,
        "read_row_groups",
        lambda self, groups, **options: (read.extend(groups), plain(self, groups, **options))[1],
    )
    rows = [4000, 2000]
    uris = [write_images(tmp_path / str(count), count, size=100) for count in rows]
    sources = [Source(uri=uri, weight=1) for uri in uris]
    settings = {"data": sources, "shuffle_window": 16, "cache_features": False}
    config = CONFIG.model_copy(update=settings)
    ids = np.random.default_rng(0).choice(3, 6000, p=[0.5, 0.3, 0.2]).astype(np.int16)
    counts = samples_of(sources, uris, rows, 4)
    assert counts == [4000, 4000]
    samples = mixed(sources, rows, counts, 5, window=16)
    every = BucketOrder(ids, 4, 5, window=16, samples=samples, ends=[4000, 6000])
    order = WorkerOrder(every, 0, 1)
    images = open_images(uris, ["id", "image", "caption"])
    hold_groups(config, order, images.groups)
    source = Undecoded(Share(images, order.rows))
    feed = Feed(config, order, source, [SHAPE] * 3, rows=6000, ahead=2, ends=[4000, 6000])
    taken = [feed.get(step) and feed.sources().tolist() for step in range(every.steps_per_epoch)]
    assert np.mean(taken) == pytest.approx(0.5, abs=0.005)
    # An epoch passes 1,000 row groups, those of the second source twice; its samples are 8,000.
    assert len(read) <= 2500
    assert images.groups.held.rows == 5 * (16 + 2 * 3 * 2 * 8)


def test_what_waits_for_reading_is_fetched_ahead_and_what_is_held_is_not(
    edit_data: str, tiny_model_dir: Path
) -> None:
    config = CONFIG.model_copy(update={"prefetch_steps": 3})
    model = models.load(tiny_model_dir)
    encoder = FrozenEncoder(model, edits=True, resolution=64)
    share = Share(open_images([edit_data], config.columns), np.arange(4))
    order = WorkerOrder(SampleOrder(4, 4, CONFIG.seed), 0, 1)
    live = make_feed(config, order, LiveFeatures(encoder, share, config.texts))
    held = make_feed(config, order, CachedFeatures(encoder, share, config.texts))
    for feed, ahead in ((live, 3), (held, 0)):
        draws, features = feed.get(0)
        assert draws.noise.shape == features.latent.shape == (4, 8, 8, 8)
        assert len(feed._coming) == ahead
