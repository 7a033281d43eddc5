"""The parts of the peers' comparison that need none of the peers."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.peers.__main__ import HERE, OURS, PEERS, _lines, _rows
from benchmarks.peers.inputs import make_inputs


def test_every_form_of_the_input_holds_the_same_and_some_of_it_is_bad(tmp_path: Path) -> None:
    good = make_inputs(tmp_path / "in", 25, 3, 300)
    rows = pq.read_table(tmp_path / "in/data").to_pylist()
    assert len(rows) == 25 and len(good) == 19 and good < {row["id"] for row in rows}
    for row in rows:
        assert (tmp_path / f"in/files/{row['id']}.jpg").read_bytes() == row["image"]
        image = Image.open(io.BytesIO(row["image"]))
        try:
            image.load()
            fine = min(image.size) >= 256 and max(image.size) <= 3 * min(image.size)
        except OSError:
            fine = False
        assert fine == (row["id"] in good)
    listed = [json.loads(line) for line in (tmp_path / "in/images.jsonl").open()]
    assert [row["id"] for row in listed] == [row["id"] for row in rows]
    assert all(Path(path).is_file() for row in listed for path in row["images"])
    asked = [json.loads(line)["id"] for line in (tmp_path / "in/prompts.jsonl").open()]
    assert asked == [path.stem for path in sorted((tmp_path / "in/small").iterdir())]


def test_what_a_peer_wrote_is_read_whatever_its_form(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    pq.write_table(
        pa.table({"id": ["a"], "answer": ["x"], "more": [1]}), tmp_path / "data/p.parquet"
    )
    (tmp_path / "data/part.jsonl").write_text('{"id": "b", "answer": ""}\n')
    (tmp_path / "data/part_stats.jsonl").write_text('{"width": 1}\n')
    assert _rows(tmp_path) == [{"id": "a", "answer": "x"}, {"id": "b", "answer": ""}]


@pytest.mark.parametrize("peer", PEERS)
def test_every_peer_has_a_short_runner_and_pinned_packages(peer: str) -> None:
    assert 10 < _lines(peer) < 100
    if peer != OURS:
        pinned = (HERE / f"requirements/{peer}.txt").read_text().split()
        assert all("==" in line for line in pinned)
        assert any(peer.replace("_", "-") in line for line in pinned)
