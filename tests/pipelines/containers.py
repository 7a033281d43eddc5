"""Small copies of the forms that data sets come in."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.pipelines.samples import edited, encoded, photo

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
"""How Hugging Face stores an image."""


def source(number: int) -> bytes:
    return encoded(photo(number))


def target(number: int) -> bytes:
    return encoded(edited(photo(number)))


def struct(data: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": data, "path": path}


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]], row_group: int = 3) -> Path:
    """Rows as Parquet; a dictionary is an image."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [name for name, value in rows[0].items() if isinstance(value, dict)]
    plain = pa.Table.from_pylist([{k: r[k] for k in r if k not in images} for r in rows])
    for name in images:
        plain = plain.append_column(name, pa.array([row[name] for row in rows], IMAGE))
    pq.write_table(plain, path, row_group_size=row_group)
    return path


def write_tar(path: Path, members: Sequence[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return path


def pair_samples(numbers: Sequence[int]) -> list[tuple[str, bytes]]:
    """WebDataset samples of edit pairs."""
    return [
        member
        for n in numbers
        for member in (
            (f"{n:05d}.image.png", source(n)),
            (f"{n:05d}.image_target.png", target(n)),
            (f"{n:05d}.json", json.dumps({"instruction": f"Add box {n}."}).encode()),
        )
    ]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
