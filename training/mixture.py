"""What an epoch has of each of a stage's data: how many samples, which ones, and how to say it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dim.learning.mixture import mixed, samples_of
from infra.samples import extent
from training.stage import StageConfig


def count_sources(config: StageConfig) -> list[int]:
    """Samples in each of the data of a stage, as their manifests say.

    Raises:
        StorageError: one cannot be read.
    """
    return [extent(uri)["records"] for uri in config.uris]


def epoch_samples(config: StageConfig, rows: Sequence[int]) -> list[int]:
    """Of each of the stage's data, which have ``rows`` samples, how many an epoch has.

    Raises:
        InputError: as for ``samples_of``.
    """
    return samples_of(config.data, config.source_names, rows, config.batch_size)


def mixed_samples(config: StageConfig, rows: Sequence[int]) -> NDArray[np.int64] | None:
    """The row numbers of an epoch, source after source; ``None`` where each row is there once.

    Raises:
        InputError: as for ``samples_of``.
    """
    counts = epoch_samples(config, rows)
    return mixed(config.data, rows, counts, config.seed, window=config.shuffle_window)


def describe_mixture(config: StageConfig, rows: Sequence[int]) -> str:
    """Of each source, which have ``rows`` samples, its share of an epoch and how often it comes.

    Raises:
        InputError: as for ``samples_of``.
    """
    counts = epoch_samples(config, rows)
    parts = []
    for source, name, held, count in zip(
        config.data, config.source_names, rows, counts, strict=True
    ):
        used = min(held, source.cap or held)
        some = f"{used:,}" if used == held else f"{used:,} of {held:,}"
        share, times = count / max(1, sum(counts)), count / max(1, used)
        parts.append(f"{share:.1%} {name} ({some} samples, {times:.3g} times each)")
    return ", ".join(parts)
