"""Paint held-out edits with a trained model, and read with the checker what came out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import torch

from dim import model as models
from dim import tabletop
from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from dim.images import decode_image, encode_png
from dim.tabletop import Scene
from infra.models import on_this_machine
from pipelines.attempts import stop_after, stop_after_restarts

# Whose words a held-out edit is painted from.
BLUEPRINT, SELF, INSTRUCTION = "blueprint", "self", "instruction"
WAYS = (BLUEPRINT, SELF, INSTRUCTION)

PAINTED = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("kind", pa.string()),
        pa.field("referential", pa.bool_()),
        pa.field("way", pa.string(), nullable=False),
        pa.field("instruction", pa.string()),
        pa.field("text", pa.string()),
        pa.field("designed_right", pa.bool_()),
        pa.field("exact", pa.bool_()),
        pa.field("strict", pa.bool_()),
        pa.field("source", pa.large_binary()),
        pa.field("edited", pa.large_binary()),
        pa.field("target", pa.large_binary()),
    ]
)
"""One painted edit. ``text`` is what it was painted from (null: the designer wrote no blueprint),
``designed_right`` says that its edit area and result are the oracle's, ``exact`` that the checker
finds the target scene, ``strict`` that all of it is well drawn and nothing else changed (see
:class:`dim.tabletop.Judgement`). Images are PNG."""


class PaintEdits:
    """A worker that holds a model and paints DIM-Edit records in each of ``ways``.

    Args:
        model: folder of a DIM.
        ways: some of :data:`WAYS`: the record's own blueprint, one by the model's understanding
            module, or the bare instruction.
        steps, guidance_scale: as ``DIM.edit`` takes them.
    """

    def __init__(
        self, model: str, ways: tuple[str, ...], steps: int | None, guidance_scale: float | None
    ) -> None:
        stop_after_restarts()
        torch.set_num_threads(1)
        self._model = models.load(on_this_machine(model))
        self._ways = ways
        self._steps, self._scale = steps, guidance_scale

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """DIM-Edit records with a tabletop provenance in, ``PAINTED`` rows out, way by way."""
        stop_after()
        rows = batch.to_pylist()
        for way in self._ways:
            yield pa.Table.from_pylist(self._paint(rows, way), PAINTED)

    def _paint(self, rows: list[dict[str, Any]], way: str) -> list[dict[str, Any]]:
        sources = [decode_image(row["image"], name=row["id"]) for row in rows]
        instructions = [row["instruction"] for row in rows]
        texts: list[str | None]
        if way == SELF:
            texts = [*map(_blueprint_or_none, self._model.design(sources, instructions))]
        else:
            texts = [row[way] for row in rows]
        results = self._model.edit(
            sources,
            instructions,
            blueprints=texts if way != INSTRUCTION else None,
            seeds=list(range(len(rows))),
            steps=self._steps,
            guidance_scale=self._scale,
        )
        return [
            self._judge(row, way, text, encode_png(result.image))
            for row, text, result in zip(rows, texts, results, strict=True)
        ]

    def _judge(
        self, row: dict[str, Any], way: str, text: str | None, edited: bytes
    ) -> dict[str, Any]:
        truth = json.loads(row["provenance"])["tabletop"]
        target, source = (
            Scene.from_json(json.dumps(truth[name])) for name in ("target_scene", "source_scene")
        )
        judged = tabletop.judge(decode_image(edited), target, source)
        right = None if way == INSTRUCTION else _same_design(text, row["blueprint"])
        return {
            "id": row["id"],
            "kind": truth["kind"],
            "referential": truth["referential"],
            "way": way,
            "instruction": row["instruction"],
            "text": text,
            "designed_right": right,
            "exact": text is not None and judged.exact,
            "strict": text is not None and judged.strict,
            "source": row["image"],
            "edited": edited,
            "target": row["image_target"],
        }


def _blueprint_or_none(answer: str) -> str | None:
    try:
        return Blueprint.parse(answer).render()
    except BlueprintError:
        return None


def _same_design(text: str | None, truth: str) -> bool:
    if text is None:
        return False
    written, right = Blueprint.parse(text), Blueprint.parse(truth)
    return (written.edit_area, written.imagination) == (right.edit_area, right.imagination)
