"""What each step of a worker is fed: its random draws, and the features they ask for."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from dim.features.encoder import Features, FeatureSource, choose_texts
from dim.learning.draws import Draws, draw
from dim.learning.order import WorkerOrder
from training.stage import StageConfig


class Feed:
    """Draws and features by step.

    Args:
        config: The stage.
        order: Which samples a step takes.
        features: Where their features come from.
        latent_shape: (C, h, w) of the noise.
        ahead: Fetch the features of the next step while one is computed; for features that wait
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
        self._next: tuple[int, Future[tuple[Draws, Features]]] | None = None

    def get(self, step: int) -> tuple[Draws, Features]:
        """Draws and features of ``step`` (from 0), on the CPU.

        Raises:
            DimError: a sample cannot be read.
        """
        if self._thread is None:
            return self._make(step)
        if self._next is not None and self._next[0] == step:
            future = self._next[1]
        else:
            future = self._thread.submit(self._make, step)
        # Also past the last step: the order has no end, and what is fetched there is not used.
        self._next = step + 1, self._thread.submit(self._make, step + 1)
        return future.result()

    def _make(self, step: int) -> tuple[Draws, Features]:
        draws = draw(
            self._config.seed,
            step,
            self._order.slots,
            self._latent_shape,
            dropout=self._config.condition_dropout,
        )
        texts = choose_texts(draws.choice, self._config.text_shares)
        return draws, self._features.batch(self._order.batch(step), texts)
