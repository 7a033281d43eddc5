"""Inputs of many files, which tasks look at: the same ranges as of a driver that does it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dim.errors import InputError
from infra import storage
from pipelines import ingest
from pipelines.ingest import IngestConfig
from pipelines.readers import scanning
from pipelines.readers.addresses import Addresses
from pipelines.readers.listing import list_files
from pipelines.readers.sources import Source
from tests.pipelines.containers import (
    pair_samples,
    source,
    struct,
    write_lines,
    write_parquet,
    write_tar,
)

TARS = 8


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """Tars with ids that repeat among them; one is damaged at its end."""
    for number in range(TARS):
        path = write_tar(tmp_path / "in" / f"{number % 2}" / f"{number}.tar", pair_samples([1, 2]))
        if number == 4:
            path.write_bytes(path.read_bytes()[:-9000])
    return tmp_path / "in"


def opened(**given: Any) -> Source:
    return ingest.open_source(IngestConfig(out="o", rows_per_file=3, **given))


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_find_what_the_driver_finds(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [{"image_path": f"{n % 2}/{n}/{1 + n % 3:05d}.image.png"} for n in range(TARS * 3)]
    named = str(write_lines(many.parent / "named.jsonl", lines))
    givens: list[dict[str, Any]] = [
        {"pairs": str(many)},
        {"images": named, "media": {"uri": str(many)}},
    ]
    by_tasks = [opened(**given) for given in givens]
    monkeypatch.setattr(scanning, "_FEW", 1000)
    for made, given in zip(by_tasks, givens, strict=True):
        alone = opened(**given)
        assert (made.ranges, made.identity) == (alone.ranges, alone.identity)
        assert made.rows == alone.rows > TARS


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_wrong_with_a_file_is_said_as_ever(tmp_path: Path) -> None:
    for number in range(TARS):
        row = {"image": struct(source(1)), "x": 1} if number % 5 else {"y": 1}
        write_parquet(tmp_path / "in" / f"{number}.parquet", [row])
    with pytest.raises(InputError) as error:
        opened(images=str(tmp_path / "in"))
    assert "\n" not in str(error.value)
    assert "0.parquet has no column" in str(error.value)  # the first of those that have none


def test_an_object_store_is_listed_folder_by_folder(s3: str) -> None:
    store = storage.open_store(f"{s3}/in")
    for name in ("b.png", "a/x/1.png", "a/2.png", "a.png", "c/3.png"):
        store.write(name, b"x" * len(name))
    listed = list_files(Addresses(store))
    assert listed.files == store.list() and len(listed.files) == 5
