"""Filters: which images and pairs are worth a designer's time."""

from pipelines.filters.images import FilterImages, open_checked
from pipelines.filters.pairs import FilterPairs, check_pair
from pipelines.filters.rules import ImageRules, PairRules, PairThresholds

__all__ = [
    "FilterImages",
    "FilterPairs",
    "ImageRules",
    "PairRules",
    "PairThresholds",
    "check_pair",
    "open_checked",
]
