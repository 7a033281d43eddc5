"""Filters: which images and pairs are worth a designer's time."""

from pipelines.stages.filters.images import FilterImages, open_checked, probe
from pipelines.stages.filters.pairs import FilterPairs, check_pair
from pipelines.stages.filters.rules import ImageRules, PairRules, PairThresholds

__all__ = [
    "FilterImages",
    "FilterPairs",
    "ImageRules",
    "PairRules",
    "PairThresholds",
    "check_pair",
    "open_checked",
    "probe",
]
