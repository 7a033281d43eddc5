"""A painter that was started with an adapter paints with it."""

from __future__ import annotations

import asyncio
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dim import model as models
from dim import provenance
from dim.model.lora.merge import hashes
from serving.config import ServingConfig
from serving.encoding import Output
from serving.jobs import GenerateJob, Painted, Preview
from serving.painter import PainterDeployment
from tests.dim.model.lora.adapters import make_adapter


async def pieces(painter: PainterDeployment, job: GenerateJob) -> list[Preview | Painted]:
    return [piece async for piece in painter.paint(job)]


@pytest.mark.parametrize("weight", ["", ":0"])
def test_the_painter_merges_the_adapters_it_is_given(
    weight: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "adapter"
    adapter = f"{make_adapter(tiny_model_dir, folder, rank=2, train=['patch_embed'])}{weight}"
    painter = PainterDeployment(ServingConfig(model=str(tiny_model_dir), lora=(adapter,)))
    job = GenerateJob(
        prompt="a blue star", size=(64, 64), seed=5, steps=2, guidance_scale=1.0,
        output=Output(metadata=(("model", "x"),)),
    )  # fmt: skip
    (painted,) = asyncio.run(pieces(painter, job))
    assert isinstance(painted, Painted)
    said = provenance.read(painted.data) or {}
    assert said.get("lora", "") == hashes([adapter])
    assert bool(said.get("lora")) != bool(weight)  # at weight 0 it has no part in the image
    made = np.asarray(Image.open(io.BytesIO(painted.data)))
    images = [
        models.load(tiny_model_dir, lora=lora).generate(["a blue star"], seeds=[5], steps=2)[0]
        for lora in ([adapter], [])
    ]
    with_adapter, without = map(np.asarray, images)
    assert np.array_equal(made, with_adapter)
    assert np.array_equal(made, without) == bool(weight)
