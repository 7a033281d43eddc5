"""What an image says of itself that ``dim edit`` or ``dim generate`` has painted."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dim import provenance

if TYPE_CHECKING:  # torch takes seconds
    from dim.model import DIM


def said_of(
    dim: DIM,
    model: Path,
    lora: Sequence[str],
    *,
    seed: int,
    steps: int | None,
    guidance_scale: float | None,
    blueprint: str | None = None,
) -> dict[str, str]:
    """The same words as of an image that a server painted.

    Args:
        dim: what painted it.
        model: the folder that it was loaded from.
        lora: the adapters, ``PATH[:WEIGHT]`` each, that were merged into it.
        seed, steps, guidance_scale: of the painting; ``None`` is the model's own.
        blueprint: what was painted from.
    """
    from dim.model.checkpoint import content
    from dim.model.lora.merge import hashes

    sampling, model_hash = dim.config.sampling, content.of_path(model)
    name = content.name_of(model.absolute())
    return provenance.words(
        model=name,
        release=content.release_of(name, model_hash),
        model_hash=model_hash,
        lora=hashes(lora),
        seed=seed,
        steps=sampling.steps if steps is None else steps,
        guidance_scale=sampling.guidance_scale if guidance_scale is None else guidance_scale,
        blueprint=blueprint,
    )
