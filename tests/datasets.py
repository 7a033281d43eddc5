"""Small tabletop data sets in the form that the data jobs leave behind."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dim import tabletop

Rows = list[dict[str, Any]]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def edit_rows(count: int, seed: int = 0) -> Rows:
    rows = []
    for index in range(count):
        edit = tabletop.sample_edit(np.random.default_rng([seed, index]))
        origin = {"kind": edit.kind, "target_scene": edit.target.to_json()}
        rows.append(
            {
                "id": f"edit-{index}",
                "index": index,
                "source": "tabletop",
                "instruction": edit.instruction,
                "blueprint": edit.blueprint.render(),
                "image": png(tabletop.render(edit.source, 64)),
                "image_target": png(tabletop.render(edit.target, 64)),
                "provenance": json.dumps({"tabletop": origin}),
            }
        )
    return rows


def t2i_rows(count: int, seed: int = 0) -> Rows:
    rows = []
    for index in range(count):
        scene = tabletop.sample_scene(np.random.default_rng([seed, index]))
        rows.append(
            {
                "id": f"image-{index}",
                "index": index,
                "source": "tabletop",
                "caption": tabletop.caption(scene),
                "image": png(tabletop.render(scene, 64)),
                "provenance": json.dumps({"tabletop": {"scene": scene.to_json()}}),
            }
        )
    return rows


def write_dataset(folder: Path, rows: Rows, schema: pa.Schema) -> str:
    """Two shards and a manifest, as a data job leaves them."""
    files = []
    (folder / "data").mkdir(parents=True)
    half = (len(rows) + 1) // 2
    for number, part in enumerate([rows[:half], rows[half:]]):
        path = folder / "data" / f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path)
        data = path.read_bytes()
        entry = {"path": f"data/{path.name}", "rows": len(part), "bytes": len(data)}
        files.append(entry | {"sha256": hashlib.sha256(data).hexdigest()})
    (folder / "manifest.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    return str(folder)
