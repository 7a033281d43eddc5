"""What a worker is fed: its share of the samples as features, and the draws of each step."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dim.errors import InputError, SampleError
from dim.features.encoder import (
    CachedFeatures,
    Features,
    FeatureSource,
    FrozenEncoder,
    LiveFeatures,
    ShardFeatures,
)
from dim.features.format import preparation_of
from dim.features.row_groups import RowGroups
from dim.features.shapes import SIDES, sizes
from dim.features.shards import FeatureShards, Share
from dim.learning.batch import (
    BLOCK,
    Draws,
    Order,
    Place,
    SampleOrder,
    WorkerOrder,
    choose_texts,
    draw,
)
from dim.learning.buckets import BucketOrder
from dim.model import DIM
from infra.samples import holds_features, open_features, open_images
from training.bad_samples import BadSamples
from training.log import RunLog
from training.mixture import mixed_samples
from training.plan import Plan
from training.shapes import read_shapes
from training.stage import StageConfig

_NEIGHBOURHOODS = 4  # times what a slot of one shape holds, for a slot of many


@dataclass(frozen=True)
class _Fetched:
    """What a step needs before the frozen parts run, one a slot, and what it could not use."""

    draws: Draws
    samples: list[Any]
    sources: NDArray[np.int64]
    bad: list[SampleError]


class Feed:
    """Draws and features by step and forward pass.

    Samples are read and decoded in threads, ``prefetch_steps`` steps ahead and no more; what runs
    on the worker's device runs when a step asks for it. A sample that cannot be used is replaced by
    its slot's next one.

    Args:
        config: The stage.
        order: Which samples a step takes.
        features: Where their features come from.
        latent_shapes: (C, h, w) of the noise, by the shape of a step.
        rows: Samples of the data.
        ahead: Steps that are fetched while one is computed; 0 where nothing is waited for.
        ends: How many of the data's rows there are up to the end of each source.

    Attributes:
        bad: The samples that could not be used, as far as steps have asked for them.
        passes: How the worker's slots are cut into forward passes.
    """

    def __init__(
        self,
        config: StageConfig,
        order: WorkerOrder,
        features: FeatureSource[Any],
        latent_shapes: Sequence[tuple[int, int, int]],
        *,
        rows: int,
        ahead: int,
        ends: Sequence[int] = (),
    ) -> None:
        self.bad = BadSamples(config.bad_samples, rows)
        self._config = config
        self._order = order
        self._features = features
        self._latent_shapes = latent_shapes
        self._ends = np.array(ends, np.int64)
        self.passes = order.passes(config.micro_batch)
        self._threads = ThreadPoolExecutor(ahead, thread_name_prefix="feed") if ahead else None
        self._ahead = ahead
        self._coming: dict[tuple[int, int], Future[_Fetched]] = {}
        self._now: tuple[tuple[int, int], _Fetched] | None = None
        self._waited = 0.0

    def get(self, step: int, number: int = 0, salt: int = 0) -> tuple[Draws, Features]:
        """Draws (on the CPU) and features of forward pass ``number`` of ``step`` (both from 0).

        What a step takes in passes is fetched once, and the frozen parts run on a pass at a time.
        ``salt`` is that of the draws.

        Raises:
            DimError: a sample cannot be read, see ``FeatureSource.fetch``, or none of a slot's can.
        """
        if self._now is None or self._now[0] != (step, salt):
            self._now = None  # or two steps would be held while one is waited for
            began = time.perf_counter()
            self._now = (step, salt), self._fetched(step, salt)
            self._waited += time.perf_counter() - began
            self.bad.add(len(self._order.slots), self._now[1].bad)
        fetched = self._now[1]
        chosen = self.passes.places(number).tolist()
        samples = [fetched.samples[place] for place in chosen]
        return fetched.draws.take(chosen), self._features.collate(samples)

    def sources(self, number: int = 0) -> torch.Tensor:
        """The number (B,) int64 of the source of each row that ``get`` gave last for ``number``."""
        assert self._now is not None
        return torch.from_numpy(self._now[1].sources[self.passes.places(number)])

    def take_wait(self) -> float:
        """Seconds in which steps have waited for samples since this was asked last."""
        waited, self._waited = self._waited, 0.0
        return waited

    def _fetched(self, step: int, salt: int) -> _Fetched:
        if self._threads is None:
            return self._fetch(step, salt, self._order.at(step))
        # Also past the last step: the order has no end, and what is fetched there is not used.
        window = [(at, salt) for at in range(step, step + self._ahead + 1)]
        self._coming = {key: self._coming.get(key) or self._begin(*key) for key in window}
        return self._coming.pop((step, salt)).result()

    def _begin(self, step: int, salt: int) -> Future[_Fetched]:
        assert self._threads is not None
        return self._threads.submit(self._fetch, step, salt, self._order.at(step))

    def _fetch(self, step: int, salt: int, place: Place) -> _Fetched:
        draws = draw(
            self._config.seed,
            step,
            self._order.slots,
            self._latent_shapes[place.shape],
            dropout=self._config.condition_dropout,
            salt=salt,
        )
        texts = choose_texts(draws.choice, self._config.text_shares)
        samples, positions, bad = _usable(self._features, place, texts)
        rows = self._order.rows[positions]
        return _Fetched(draws, samples, np.searchsorted(self._ends, rows, side="right"), bad)


def make_order(plan: Plan, model: DIM) -> Order:
    """Which samples make up each step of the stage, over all workers.

    Raises:
        InputError: the shapes of the samples are not those that the driver found, or that ``model``
            paints.
        StorageError: they cannot be read.
    """
    config, told = plan.config, plan.shapes
    samples = mixed_samples(config, plan.source_rows)
    ends = () if samples is None else plan.ends
    batch_size, seed, window = config.batch_size, config.seed, config.shuffle_window
    if told is None:
        return SampleOrder(plan.rows, batch_size, seed, window=window, samples=samples, ends=ends)
    resolution = model.config.sampling.resolution
    if told.sizes != list(sizes(resolution, model.cell)):
        raise InputError(
            f"the model at {config.init} paints in cells of {model.cell} px at {resolution} px, "
            "and its description says something else: buckets cannot be made"
        )
    ids = read_shapes(config.out, told)
    return BucketOrder(ids, batch_size, seed, window=window, samples=samples, ends=ends)


def make_feed(
    config: StageConfig,
    order: WorkerOrder,
    features: FeatureSource[Any],
    ends: Sequence[int] = (),
) -> Feed:
    """The feed of one worker, whose features are those of ``order.rows``; ``ends`` as in ``Feed``.

    A sample of each slot and shape is fetched, so that a slot without a usable one is found before
    the first step: what as many steps read as there are shapes.

    Raises:
        DimError: the samples cannot be read; none of a slot's can be used.
    """
    return Feed(
        config,
        order,
        features,
        [_latent_shape(features, order.beginning(shape)) for shape in range(order.shapes)],
        rows=order.total,
        ahead=config.prefetch_steps if _reads(features) else 0,
        ends=ends,
    )


def _latent_shape(features: FeatureSource[Any], place: Place) -> tuple[int, int, int]:
    """(C, h, w) of the samples at ``place``, of which every slot has a usable one."""
    samples, *_ = _usable(features, place, np.zeros(len(place.walks), np.int64))
    shape = features.collate(samples[:1]).latent.shape
    return shape[1], shape[2], shape[3]


def _usable(
    features: FeatureSource[Any], place: Place, texts: NDArray[np.int64]
) -> tuple[list[Any], NDArray[np.int64], list[SampleError]]:
    """What was fetched for each slot at ``place``, from where, and what could not be used."""
    positions = place.positions()
    samples = features.fetch(positions, texts)
    bad: list[SampleError] = []
    for slot, found in enumerate(samples):
        tries = 0
        while isinstance(found, SampleError):
            bad.append(found)
            tries += 1
            following = place.instead(slot, tries)
            if following is None:
                raise InputError(
                    f"a slot of the batch has {tries} samples and none can be used ({found}): take "
                    "these out of the data, or a smaller batch_size, which gives a slot more"
                )
            (found,) = features.fetch(following, texts[slot : slot + 1])
            positions[slot] = following[0]
        samples[slot] = found
    return samples, positions, bad


def _reads(features: FeatureSource[Any]) -> bool:
    """Whether samples are read or decoded when they are needed."""
    if isinstance(features, ShardFeatures):
        return not features.in_memory
    return isinstance(features, LiveFeatures)


def open_shards(plan: Plan, model: DIM, rank: int) -> FeatureShards | None:
    """The stage's feature shards, if its data are features; the first worker checks their key.

    Raises:
        DimError: they cannot be read, or are not what this stage and ``model`` need.
    """
    config = plan.config
    if not holds_features(config.uris):
        return None
    shards = open_features(config.uris, config.texts, edits=config.edits, every_file=False)
    _check_rows(plan, shards.rows)
    if rank == 0:
        needed = preparation_of(
            model,
            edits=config.edits,
            resolution=model.config.sampling.resolution,
            buckets=config.buckets,
            vlm_view=config.vlm_view,
        )
        shards.check_preparation(needed)
    return shards


def choose_source(
    plan: Plan, model: DIM, shards: FeatureShards | None, order: WorkerOrder, log: RunLog
) -> FeatureSource[Any]:
    """Where the features of a worker's samples come from: shards, memory, or the frozen parts.

    Raises:
        DimError: the data cannot be read, or none of the samples that are cached can be used.
    """
    config = plan.config
    if shards is not None:
        hold_groups(config, order, shards.groups)
        device = next(model.painter.parameters()).device
        return ShardFeatures(
            shards, order.rows, config.texts, in_memory=config.cache_features, device=device
        )
    images = open_images(config.uris, config.columns, every_file=False)
    _check_rows(plan, images.rows)
    hold_groups(config, order, images.groups)
    share = Share(images, order.rows, SIDES if config.buckets else ())
    threads = config.cpus_per_worker
    encoder = make_encoder(config, model)
    if not config.cache_features:
        return LiveFeatures(encoder, share, config.texts, threads=threads)
    return CachedFeatures(
        encoder,
        share,
        config.texts,
        encode_batch=config.encode_batch,
        threads=threads,
        progress=lambda done, total: log.add(0, {"features_done": done / total}),
    )


def make_encoder(config: StageConfig, model: DIM) -> FrozenEncoder:
    """What makes the features of the stage's samples, and of its held-out ones.

    Raises:
        InputError: the autoencoder cannot work at the model's resolution.
    """
    return FrozenEncoder(
        model,
        edits=config.edits,
        resolution=model.config.sampling.resolution,
        buckets=config.buckets,
        vlm_view=config.vlm_view,
    )


def hold_groups(config: StageConfig, order: WorkerOrder, groups: RowGroups) -> None:
    """Where samples are mixed within a window, each row group is read once and kept for a while.

    Of several shapes some are a few blocks ahead of others, so more is kept for them.
    """
    window = config.shuffle_window
    if window is not None and not config.cache_features:
        walks = len(order.slots) + len(config.data) - 1  # slots may walk through several sources
        runs = (2 + window // BLOCK) * min(order.shapes, _NEIGHBOURHOODS)
        groups.hold(walks, window, runs)


def _check_rows(plan: Plan, count: int) -> None:
    if count != plan.rows:
        raise InputError(f"the training data changed: {plan.rows} samples became {count}")
