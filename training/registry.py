"""A finished stage's model as a version of a registered one, with aliases that lead to it."""

from __future__ import annotations

from collections.abc import Mapping

from infra import storage
from infra.registry import Registered, Registry, describe, signature
from training.record import MODEL_FOLDER, StageRecord
from training.stage import RegistryConfig, StageConfig

CHAMPION = "champion"
"""The alias of the best version, by the metric that the stage names."""


def register(
    config: StageConfig, record: StageRecord, wanted: RegistryConfig, uri: str
) -> Registered:
    """Register what a finished stage has trained; the same once only.

    Args:
        config: of the stage.
        record: of its run, finished.
        wanted: as what.
        uri: of the MLflow store.

    Raises:
        TrackingError: the store has no registry, or refuses it.
    """
    folder = storage.join(config.out, MODEL_FOLDER)
    describe(folder, record.run_id, signature(edits=config.edits))
    registry = Registry(uri)
    made = registry.register(
        wanted.name,
        folder,
        record.run_id,
        metrics=record.metrics,
        tags={
            "stage": config.stage,
            "data": ", ".join(config.uris),
            "data.content": str(record.identity["data"]),
            "init": config.init,
            "init.content": str(record.identity["init"]),
        },
    )
    registry.point(config.stage, made)
    if _is_best(wanted, registry, made.metrics):
        registry.point(CHAMPION, made)
    return registry.version(made.name, made.version)


def _is_best(wanted: RegistryConfig, registry: Registry, metrics: Mapping[str, float]) -> bool:
    """Whether no version that has the metric is better; of two alike the newer one is."""
    name = wanted.champion
    if name is None or name not in metrics:
        return False
    best = registry.find(wanted.name, CHAMPION)
    if best is None or name not in best.metrics:
        return True
    gain = metrics[name] - best.metrics[name]
    return gain >= 0 if wanted.higher_is_better else gain <= 0
