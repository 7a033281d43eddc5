"""What a worker is fed: its share of the samples as features, and the draws of each step."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dim.errors import InputError
from dim.features.encoder import (
    CachedFeatures,
    Features,
    FeatureSource,
    FrozenEncoder,
    LiveFeatures,
    ShardFeatures,
)
from dim.features.format import preparation_of
from dim.features.shards import FeatureShards
from dim.learning.batch import Draws, WorkerOrder, choose_texts, draw
from dim.model import DIM
from infra.samples import holds_features, open_features, open_images
from training.log import RunLog
from training.plan import Plan
from training.stage import StageConfig


class Feed:
    """Draws and features by step and forward pass.

    Args:
        config: The stage.
        order: Which samples a step takes.
        features: Where their features come from.
        latent_shape: (C, h, w) of the noise.
        ahead: Fetch the features of the next pass while one is computed; for features that wait
            for a disk or an object store.
    """

    def __init__(
        self,
        config: StageConfig,
        order: WorkerOrder,
        features: FeatureSource,
        latent_shape: tuple[int, int, int],
        *,
        ahead: bool,
    ) -> None:
        self._config = config
        self._order = order
        self._features = features
        self._latent_shape = latent_shape
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="feed") if ahead else None
        self._next: tuple[tuple[int, int, int], Future[tuple[Draws, Features]]] | None = None
        self.passes = order.passes(config.micro_batch)

    def get(self, step: int, number: int = 0, salt: int = 0) -> tuple[Draws, Features]:
        """Draws and features of forward pass ``number`` of ``step`` (both from 0), on the CPU.

        Raises:
            DimError: a sample cannot be read.
        """
        if self._thread is None:
            return self._make(step, number, salt)
        if self._next is not None and self._next[0] == (step, number, salt):
            future = self._next[1]
        else:
            future = self._thread.submit(self._make, step, number, salt)
        # Also past the last step: the order has no end, and what is fetched there is not used.
        more, number = divmod(number + 1, self.passes.count)
        following = (step + more, number, salt)
        self._next = following, self._thread.submit(self._make, *following)
        return future.result()

    def _make(self, step: int, number: int, salt: int) -> tuple[Draws, Features]:
        places = self.passes.places(number)
        draws = draw(
            self._config.seed,
            step,
            [self._order.slots[place] for place in places],
            self._latent_shape,
            dropout=self._config.condition_dropout,
            salt=salt,
        )
        texts = choose_texts(draws.choice, self._config.text_shares)
        return draws, self._features.batch(self._order.batch(step)[places], texts)


def make_feed(config: StageConfig, order: WorkerOrder, features: FeatureSource) -> Feed:
    """The feed of one worker, whose features are those of ``order.rows``.

    Raises:
        DimError: the first sample cannot be read.
    """
    one = features.batch(np.zeros(1, np.int64), np.zeros(1, np.int64)).latent
    ahead = isinstance(features, ShardFeatures) and not features.in_memory
    shape = (one.shape[1], one.shape[2], one.shape[3])
    return Feed(config, order, features, shape, ahead=ahead)


def open_shards(plan: Plan, model: DIM, rank: int) -> FeatureShards | None:
    """The stage's feature shards, if its data are features; the first worker checks their key.

    Raises:
        DimError: they cannot be read, or are not what this stage and ``model`` need.
    """
    config = plan.config
    if not holds_features(config.data):
        return None
    shards = open_features(config.data, config.texts, edits=config.edits)
    _check_rows(plan, shards.rows)
    if rank == 0:
        resolution = model.config.sampling.resolution
        shards.check_preparation(preparation_of(model, edits=config.edits, resolution=resolution))
    return shards


def choose_source(
    plan: Plan, model: DIM, shards: FeatureShards | None, order: WorkerOrder, log: RunLog
) -> FeatureSource:
    """Where the features of a worker's samples come from: shards, memory, or the frozen parts.

    Raises:
        DimError: a sample cannot be read.
    """
    config = plan.config
    if shards is not None:
        return ShardFeatures(shards, order.rows, config.texts, in_memory=config.cache_features)
    images = open_images(config.data, config.columns)
    _check_rows(plan, images.rows)
    table = images.read(order.rows)
    encoder = FrozenEncoder(model, edits=config.edits, resolution=model.config.sampling.resolution)
    if not config.cache_features:
        return LiveFeatures(encoder, table, config.texts)
    return CachedFeatures(
        encoder,
        table,
        config.texts,
        encode_batch=config.encode_batch,
        progress=lambda done, total: log.add(0, {"features_done": done / total}),
    )


def _check_rows(plan: Plan, count: int) -> None:
    if count != plan.rows:
        raise InputError(f"the training data changed: {plan.rows} samples became {count}")
