"""From a request to its jobs' settings, and from painted images to OpenAI's response."""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Sequence
from typing import TypedDict

from fastapi import Response
from fastapi.responses import JSONResponse

from serving.jobs import Defaults, EditJob, GenerateJob, Painted
from serving.requests import MAX_SEED, PaintRequest


class Settings(TypedDict):
    """Of the fields of a ``PaintJob`` those that a request may leave to the model."""

    steps: int
    guidance_scale: float


def seeds(wanted: PaintRequest) -> list[int]:
    """One seed per image: counted up from the request's, else drawn anew."""
    first = secrets.randbelow(2**31) if wanted.seed is None else wanted.seed
    return [(first + index) % (MAX_SEED + 1) for index in range(wanted.n)]


def settings(wanted: PaintRequest, defaults: Defaults) -> Settings:
    """Steps and guidance scale: the request's, else the model's own."""
    steps, scale = wanted.steps, wanted.guidance_scale
    return Settings(
        steps=defaults.steps if steps is None else steps,
        guidance_scale=defaults.guidance_scale if scale is None else scale,
    )


def respond(
    jobs: Sequence[EditJob | GenerateJob], painted: Sequence[Painted], blueprint: str | None
) -> Response:
    """OpenAI's images response; ``blueprint``, ``seed`` and ``batch_size`` are ours."""
    data = [
        {
            "b64_json": base64.b64encode(result.data).decode("ascii"),
            "revised_prompt": blueprint,
            "blueprint": blueprint,
            "seed": job.seed,
            "batch_size": result.batch_size,
        }
        for job, result in zip(jobs, painted, strict=True)
    ]
    return JSONResponse({"created": int(time.time()), "data": data})
