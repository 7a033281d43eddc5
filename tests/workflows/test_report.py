"""The report page from an evaluation that is made up; the demo's own is tested with the demo."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
from PIL import Image

from dim.images import encode_png
from pipelines.evaluate import Evaluation
from pipelines.outputs.manifest import Counts
from pipelines.stages.paint import PAINTED
from workflows.report import Report

PNG = encode_png(Image.new("RGB", (8, 8)))


def painted(name: str, way: str, exact: bool, strict: bool) -> dict[str, Any]:
    row = {"id": name, "way": way, "kind": "remove", "referential": False, "designed_right": exact}
    row |= {"exact": exact, "strict": strict, "text": f"plan {name}", "instruction": "remove it"}
    return row | {"source": PNG, "edited": PNG, "target": PNG}


def test_exact_and_strictly_exact_stand_side_by_side() -> None:
    rows = [
        painted("a", "blueprint", True, True),
        painted("b", "blueprint", True, False),
        painted("c", "blueprint", False, False),
        painted("d", "self", False, False),
    ]
    page = Report(
        title="a title",
        intro="an intro",
        evaluation=Evaluation(pa.Table.from_pylist(rows, PAINTED)),
        jobs=[("ingest", Counts(input=4, kept=4, rejected=0, failed=0, by_reason={}))],
        stages=[("edit2", {"validation_exact": 0.5, "validation_strict": 0.25})],
        places=[("model", "out/model")],
        curl="curl",
        example="an example",
    ).render()
    assert "<b>67%</b>exact (33% strictly), direct instructions, with blueprints" in page
    assert "<b>0%</b>exact (0% strictly), direct instructions, with its own blueprints" in page
    assert '<td class="number">67% of 3 (33% strictly)</td>' in page
    assert [page.count(f">{said}<") for said in ("strictly exact", "exact, not strictly")] == [1, 1]
    assert page.count(">not exact<") == 1
    assert "validation strict" in page and ">0.25<" in page
