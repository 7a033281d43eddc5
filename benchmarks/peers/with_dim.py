"""This project: the jobs that there are, by their settings."""

import os
from pathlib import Path
from typing import Any

import ray

from dim.designers import CallOptions
from pipelines import filter, ingest, t2i
from pipelines.cluster import connect
from pipelines.filters import ImageRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.stages.caption import CaptionRules

NOT_MEASURED: dict[str, Any] = dict.fromkeys(("min_entropy", "min_sharpness", "max_text_area"))
RULES = ImageRules(min_side=256, max_aspect=3.0, **NOT_MEASURED)
ANY = ImageRules(min_side=None, max_aspect=None, **NOT_MEASURED)
TAKEN = CaptionRules(
    min_words=1, min_dimensions=0, min_dimensions_in_prose=0, max_repetition=1, reasks=0
)
ALIKE = DuplicateRules(exact=False, max_distance=0)


def prepare(inputs: Path) -> None:
    """Take the pictures in, as any job's input is."""
    start(os.cpu_count() or 1)
    for name in ("files", "small"):
        config = ingest.IngestConfig(images=str(inputs / name), out=str(inputs / f"raw-{name}"))
        ingest.run(config)


def start(processes: int) -> None:
    """A Ray on this machine."""
    ray.init(num_cpus=min(processes, os.cpu_count() or 1), include_dashboard=False)
    connect()


def filter_images(inputs: Path, out: Path, processes: int) -> None:
    """``dim data filter``."""
    filter.run(
        filter.FilterImagesConfig(
            raw=str(inputs / "raw-files"), out=str(out), filters=RULES, duplicates=ALIKE
        )
    )


def ask(inputs: Path, out: Path, in_flight: int, url: str) -> None:
    """``dim data t2i``: every question has a picture of 64 px."""
    t2i.run(
        t2i.T2IConfig(
            raw=str(inputs / "raw-small"),
            out=str(out),
            captioner=f"openai:m@{url}",
            calls=CallOptions(in_flight=in_flight),
            filters=ANY,
            duplicates=DuplicateRules(exact=False, max_distance=None),
            captions=TAKEN,
        )
    )
