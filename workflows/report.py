"""The report page: one HTML file with its pictures inside."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.compute as pc

from pipelines.evaluate import NAMES, Evaluation, summary
from pipelines.outputs.manifest import Counts
from pipelines.outputs.pages import render
from pipelines.stages.paint import BLUEPRINT, SELF

_METRICS = (
    "loss",
    "samples_per_second",
    "validation_loss",
    "validation_exact",
    "validation_strict",
)


@dataclass(frozen=True)
class Report:
    """What the page tells."""

    title: str
    intro: str
    evaluation: Evaluation
    jobs: Sequence[tuple[str, Counts]]
    stages: Sequence[tuple[str, Mapping[str, float]]]
    places: Sequence[tuple[str, str]]
    curl: str
    example: str
    samples: int = 24

    def render(self) -> str:
        """The page as HTML, with nothing that it would have to fetch."""
        return render(
            "workflows",
            "report.html.j2",
            title=self.title,
            intro=self.intro,
            headline=self._headline(),
            ways=[NAMES[way] for way in self.evaluation.ways],
            summary=summary(self.evaluation),
            samples=_samples(self.evaluation, self.samples),
            jobs=self.jobs,
            metric_names=[name.replace("_", " ") for name in _METRICS],
            stages=[
                (name, [_number(metrics.get(key)) for key in _METRICS])
                for name, metrics in self.stages
            ],
            places=self.places,
            curl=self.curl,
            example=self.example,
        )

    def _headline(self) -> list[tuple[str, str]]:
        evaluation = self.evaluation
        shown = []
        for way in evaluation.ways:
            share = evaluation.share(way, referential=False)
            name = (
                f"exact ({share.strict_accuracy:.0%} strictly), direct instructions, {NAMES[way]}"
            )
            shown.append((name, f"{share.accuracy:.0%}"))
        if SELF in evaluation.ways:
            right = evaluation.designed_right(SELF)
            shown.append(("of the model's own blueprints are right", f"{right:.0%}"))
        return shown


def _samples(evaluation: Evaluation, count: int) -> list[dict[str, Any]]:
    """The first held-out edits, painted from blueprints: not chosen by how they came out."""
    way = BLUEPRINT if BLUEPRINT in evaluation.ways else evaluation.ways[0]
    rows = evaluation.painted.filter(pc.field("way") == way).slice(0, count).to_pylist()
    return [
        {
            "text": row["text"] or row["instruction"],
            "exact": row["exact"],
            "said": _said(row),
            **{name: _data_url(row[name]) for name in ("source", "edited", "target")},
        }
        for row in rows
    ]


def _said(row: Mapping[str, Any]) -> str:
    if not row["exact"]:
        return "not exact"
    return "strictly exact" if row["strict"] else "exact, not strictly"


def _data_url(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"
