"""The pictures and questions that every peer is given, in the form that it reads."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.data_filters import picture

_PER_FILE = 128
_BAD_EVERY = 20  # of each kind


def make_inputs(folder: Path, pictures: int, questions: int, side: int) -> set[str]:
    """Write all of it; returns the ids of the pictures that are good.

    ``data/`` holds Parquet files with the bytes, ``files/`` the same as files, ``images.jsonl``
    their paths, ``prompts.jsonl`` the questions, and ``small/`` a little picture for each.
    """
    for name in ("data", "files", "small"):
        (folder / name).mkdir(parents=True)
    rows, good = [], set()
    for number in range(pictures):
        name = f"p{number:06}"
        data, is_good = _encoded(number, side)
        rows.append({"id": name, "image": data})
        (folder / f"files/{name}.jpg").write_bytes(data)
        if is_good:
            good.add(name)
    for first in range(0, pictures, _PER_FILE):
        table = pa.Table.from_pylist(rows[first : first + _PER_FILE])
        pq.write_table(table, folder / f"data/part-{first // _PER_FILE:04}.parquet")
    for number in range(questions):
        picture(pictures + number, 64).save(folder / f"small/p{number:06}.png")
    _write_lines(
        folder / "images.jsonl",
        [
            {"id": row["id"], "prompt": "", "images": [str(folder / f"files/{row['id']}.jpg")]}
            for row in rows
        ],
    )
    _write_lines(
        folder / "prompts.jsonl",
        [
            {"id": f"p{number:06}", "prompt": f"What is in picture {number}?", "answer": ""}
            for number in range(questions)
        ],
    )
    return good


def _encoded(number: int, side: int) -> tuple[bytes, bool]:
    """A picture as JPEG, and whether it is good: some are too small, too long or cut off."""
    bad = number % _BAD_EVERY
    image = picture(number, 128 if bad == 0 else side)
    if bad == 1:
        image = image.resize((side * 2, side // 2))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    data = buffer.getvalue()
    return (data[: len(data) // 2], False) if bad == 2 else (data, bad > 2)


def _write_lines(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
