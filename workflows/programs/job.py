"""A data job as a program."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dim.config import StrictModel
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Manifest
from workflows.programs.program import Done, Program, Tell, hash_of


def data_program(config: type[StrictModel], module: Any) -> Program:
    """The job ``module``, which tells how many of its ranges are done."""

    def run(config: Any, out: str, anew: bool, tell: Tell) -> Done:
        begun: tuple[int, float] | None = None

        def on_progress(done: int, ranges: int, usd: float) -> None:
            nonlocal begun
            now = time.monotonic()
            begun = begun or (done, now)
            said = f"{done} of {ranges} ranges"
            if now > begun[1]:
                said += f" · {60 * (done - begun[0]) / (now - begun[1]):.0f} a minute"
            tell(done / ranges, said, usd)

        manifest: Manifest = module.run(config, overwrite=anew, on_progress=on_progress)
        usd = (manifest.cost or {}).get("usd", 0.0)
        return Done(manifest.counts.in_words(), manifest.counts.model_dump(), usd)

    return Program(config, "data", run, _of_manifest)


def _of_manifest(config: Any, result: Mapping[str, Any]) -> str | None:
    return hash_of(config.out, manifests.NAME)
