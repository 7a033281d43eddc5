"""The dataset card: README.md of an output, with the front matter that Hugging Face reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import typer
import yaml
from numpy.typing import NDArray
from pydantic import Field

from dim.config import StrictModel, load_config
from dim.errors import ConfigError
from dim.records import EDIT, RAW_IMAGE, RAW_PAIR, T2I, kind_of, version_of
from infra.storage import Store
from infra.tracking import flatten
from pipelines.command import Overrides
from pipelines.outputs import pages
from pipelines.outputs.files import FOLDERS
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.shards import Shards

NAME = "README.md"

_TITLES = {
    "edit": ("DIM-Edit", "Edit pairs, each with the blueprint of its edit.", "image-to-image"),
    "t2i": ("DIM-T2I", "Images, each with a long caption.", "text-to-image"),
    "raw_pair": ("Raw edit pairs", "Edit pairs as they came in.", "image-to-image"),
    "raw_image": ("Raw images", "Images as they came in.", "text-to-image"),
}
_PROMPTS = {"edit": "answer", "t2i": "caption", "raw_pair": "instruction"}
_PERCENTILES = (5, 25, 50, 75, 95, 99)
_SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"),
          (10_000_000, "1M<n<10M"), (100_000_000, "10M<n<100M"))  # fmt: skip
_UNKNOWN = "not declared"
# What says where and how a job ran, or is told elsewhere on the card.
_NOT_SHOWN = (
    *("out", "raw", "tracking", "licences", "workers", "cpus_per_worker", "batch_size"),
    "range_timeout_s",
)


class CardConfig(StrictModel):
    """What a card says that the output does not."""

    licences: dict[str, str] = Field(default_factory=dict)
    """The licence of each source, above those in the job's settings."""


@dataclass(frozen=True)
class Words:
    """How long the prompts in ``column`` are, in words divided by white space."""

    column: str
    mean: float
    percentiles: dict[str, float]


def write(shards: Shards, licences: Mapping[str, str] | None = None) -> str:
    """Write README.md into a finished output; returns its text.

    Args:
        shards: the output.
        licences: the licence of each source, above those in the job's settings.

    Raises:
        ConfigError: ``licences`` names a source of which there is no record.
        StorageError: something cannot be read or written.
    """
    text = render(shards, licences)
    shards.store.write(NAME, text.encode())
    return text


def render(shards: Shards, licences: Mapping[str, str] | None = None) -> str:
    """The card of a finished output, from its manifest and its records' texts alone."""
    manifest, store, schema = shards.manifest, shards.store, shards.schema
    kind = kind_of(schema) or ""
    title, intro, task = _TITLES[kind]
    declared = {**manifest.config.get("licences", {}), **(licences or {})}
    sources = count_sources(store, manifest)
    unknown = sorted(set(licences or {}) - set(sources))
    if unknown:
        raise ConfigError(
            f"licences: there is no source {unknown[0]!r} in {store.uri}; "
            f"there are {', '.join(sorted(sources)) or 'none'}"
        )
    shown = {key: value for key, value in manifest.config.items() if key not in _NOT_SHOWN}
    return pages.render(
        "pipelines.outputs",
        "card.md.j2",
        front=_front_matter(title, task, kind, schema, manifest, _licence(declared, sources)),
        title=title,
        intro=intro,
        counts=manifest.counts,
        sources=[
            (_cell(name), _cell(declared.get(name, _UNKNOWN)), sources[name])
            for name in sorted(sources)
        ],
        reasons=sorted(manifest.counts.by_reason.items(), key=lambda item: (-item[1], item[0])),
        words=count_words(shards, _PROMPTS[kind]) if kind in _PROMPTS else None,
        settings=[(_cell(name), _cell(value)) for name, value in flatten(shown).items()],
        cost=manifest.cost,
        files=len(shards.files),
        bytes=sum(file.bytes for file in shards.files),
        columns=[(field.name, _cell(str(field.type))) for field in schema],
    )


def count_sources(store: Store, manifest: Manifest) -> dict[str, dict[str, int]]:
    """Records by source, and of each source by outcome (``kept``, ``rejected``, ``failed``)."""
    found: dict[str, Counter[str]] = {}
    outcome_of = {folder: outcome for outcome, folder in FOLDERS.items()}
    for entry in manifest.files:
        outcome = outcome_of[entry.path.partition("/")[0]]
        with store.open_parquet(entry.path) as file:
            for batch in file.iter_batches(columns=["source"]):
                for item in pc.value_counts(batch.column(0)).to_pylist():
                    found.setdefault(item["values"], Counter())[outcome] += item["counts"]
    return {name: {key: counts[key] for key in FOLDERS} for name, counts in found.items()}


def count_words(shards: Shards, column: str) -> Words | None:
    """The lengths of the texts in ``column``; ``None`` where there is no text."""
    lengths: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
    for batch in shards.batches(4096, [column]):
        words = pc.split_pattern_regex(pc.utf8_trim_whitespace(batch[column].drop_null()), r"\s+")
        lengths.append(pc.list_value_length(words).to_numpy().astype(np.int64))
    counts = np.concatenate(lengths)
    if not len(counts):
        return None
    values = np.percentile(counts, _PERCENTILES)
    names = [f"p{percent}" for percent in _PERCENTILES]
    return Words(column, float(counts.mean()), dict(zip(names, values.tolist(), strict=True)))


def _front_matter(
    title: str, task: str, kind: str, schema: pa.Schema, manifest: Manifest, licence: str | None
) -> str:
    kept = manifest.counts.kept
    size = next((name for limit, name in _SIZES if kept < limit), "100M<n<1B")
    files = [{"split": "train", "path": "data/*.parquet"}]
    data = {
        "pretty_name": title,
        **({"license": licence} if licence else {}),
        "task_categories": [task],
        "size_categories": [size],
        "tags": ["draw-in-mind", kind.replace("_", "-")],
        "configs": [{"config_name": "default", "data_files": files}],
        "dim": {"job": manifest.job, "schema_version": version_of(schema)},
    }
    return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)


def _licence(declared: Mapping[str, str], sources: Mapping[str, Any]) -> str | None:
    """One licence for the whole where every source has the same, else ``other``."""
    given = {declared.get(name) for name in sources}
    if not declared:
        return None
    (only, *more) = given or {None}
    return "other" if more or only is None else only


def _cell(text: str) -> str:
    """Text that stays within a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def main(
    out: Annotated[str, typer.Argument(help="Output folder of a data job: a path or s3://…")],
    overrides: Overrides = None,
) -> None:
    """Write the dataset card of an output: README.md in its folder.

    Settings: licences.SOURCE=NAME, for sources whose licence the job was not told.
    """
    chosen = load_config(CardConfig, None, overrides or [])
    shards = Shards.open(out, EDIT, T2I, RAW_PAIR, RAW_IMAGE)
    write(shards, chosen.licences)
    typer.echo(shards.store.address(NAME))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
