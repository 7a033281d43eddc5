"""What is counted of painted edits; painting itself is tested with the demo."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from dim import tabletop
from dim.images import encode_png
from pipelines.evaluate import Evaluation, summary
from pipelines.stages.paint import BLUEPRINT, PAINTED, PaintEdits


def painted(exact: bool, strict: bool, referential: bool = False) -> dict[str, Any]:
    known = {"id": "x", "way": BLUEPRINT, "kind": "remove", "referential": referential}
    return known | {"exact": exact, "strict": strict}


ROWS = [painted(True, True), painted(True, False), painted(False, False), painted(True, True, True)]
EVALUATION = Evaluation(pa.Table.from_pylist(ROWS, PAINTED))


def test_strictly_exact_edits_are_counted_beside_exact_ones() -> None:
    share = EVALUATION.share(BLUEPRINT, referential=False)
    assert (share.exact, share.strict, share.count) == (2, 1, 3)
    assert EVALUATION.metrics() == pytest.approx(
        {
            "exact/blueprint": 3 / 4,
            "exact/blueprint/direct": 2 / 3,
            "exact/blueprint/referential": 1,
            "strict/blueprint": 2 / 4,
            "strict/blueprint/direct": 1 / 3,
            "strict/blueprint/referential": 1,
        }
    )


def test_both_figures_are_shown() -> None:
    assert summary(EVALUATION) == [
        ("direct instructions", ["67% of 3 (33% strictly)"]),
        ("referential instructions", ["100% of 1 (100% strictly)"]),
        ("direct: remove", ["67% of 3 (33% strictly)"]),
    ]
    none = EVALUATION.share(BLUEPRINT, kind="add")
    assert (none.accuracy, none.strict_accuracy) == (0, 0)


def test_an_edit_is_judged_by_both_of_its_scenes(tiny_model_dir: Path) -> None:
    scene = tabletop.sample_scene(np.random.default_rng(3))
    target = replace(scene, objects=scene.objects[1:])
    truth = {"kind": "remove", "referential": False}
    truth |= {
        "source_scene": json.loads(scene.to_json()),
        "target_scene": json.loads(target.to_json()),
    }
    row = {"id": "a", "instruction": "remove it", "provenance": json.dumps({"tabletop": truth})}
    row |= {"image": b"", "image_target": b""}
    right = tabletop.render(target, 64)
    faded = Image.blend(right, Image.new("RGB", right.size, "white"), 0.15)
    judge = PaintEdits(str(tiny_model_dir), (), None, None)._judge
    for image, text, found in (
        (right, "a text", (True, True)),
        (faded, "a text", (True, False)),
        (tabletop.render(scene, 64), "a text", (False, False)),
        (right, None, (False, False)),  # what has no blueprint is not painted from one
    ):
        judged = judge(row, "instruction", text, encode_png(image))
        assert (judged["exact"], judged["strict"]) == found
