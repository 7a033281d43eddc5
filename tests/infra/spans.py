"""Where spans go that driver and workers of the tests' Ray both know: a folder of its session."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter, SpanExportResult


def processors() -> list[SimpleSpanProcessor]:
    """What ``DIM_TRACING`` names."""
    return [SimpleSpanProcessor(_Files())]


def folder() -> Path:
    return Path(ray._private.worker._global_node.get_session_dir_path()) / "logs/dim-spans"


def found() -> list[dict[str, Any]]:
    """All spans that were written so far."""
    lines = [line for file in folder().glob("*.jsonl") for line in file.read_text().splitlines()]
    return [json.loads(line) for line in lines]


class _Files(SpanExporter):
    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        folder().mkdir(exist_ok=True)
        with (folder() / f"{os.getpid()}.jsonl").open("a") as file:
            file.writelines(span.to_json(indent=None) + "\n" for span in spans)
        return SpanExportResult.SUCCESS
