"""LoRA adapters that requests choose by name: the API's side, and a painter that has several."""

from __future__ import annotations

import asyncio
import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dim import model as models
from dim import provenance
from dim.errors import CheckpointError, ConfigError
from dim.model import DIM
from serving.config import ServingConfig
from serving.jobs import GenerateJob, Painted
from serving.painter import PainterDeployment
from serving.serve import check, read_settings
from tests.dim.model.lora.adapters import make_adapter
from tests.serving.fakes import Server

ADAPTERS = {"sketch": "adapters/sketch", "oil": "adapters/oil:0.8"}


@pytest.fixture
def server() -> Server:
    return Server(adapters=ADAPTERS)


def generate(server: Server, **fields: Any) -> Any:
    return server.http.post("/v1/images/generations", json={"prompt": "a circle", **fields})


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({}, None),
        ({"model": "edit2"}, None),
        ({"adapter": "oil"}, "oil"),
        ({"model": "dim:sketch"}, "sketch"),
        ({"model": "edit2:oil", "adapter": "oil"}, "oil"),
    ],
)
def test_an_adapter_is_chosen_by_its_name_or_with_the_model(
    server: Server, fields: dict[str, str], adapter: str | None
) -> None:
    answer = generate(server, n=2, **fields)
    assert answer.status_code == 200, answer.text
    assert [job.adapter for job in server.painter.jobs] == [adapter] * 2
    said = provenance.read(base64.b64decode(answer.json()["data"][0]["b64_json"]))
    assert said is not None and said.get("adapter") == adapter


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"adapter": "sketsh"}, 400, "did you mean 'sketch'?"),
        ({"adapter": "x"}, 400, "(there are: sketch, oil)"),
        ({"model": "dim:oill"}, 404, "'edit2', 'edit2:sketch', 'edit2:oil' are"),
        ({"model": "dim:"}, 404, "not served here"),
        ({"model": "dim:oil", "adapter": "sketch"}, 400, "model says 'oil'"),
    ],
)
def test_names_that_are_not_there_are_refused(
    server: Server, fields: dict[str, str], status: int, said: str
) -> None:
    answer = generate(server, **fields)
    assert answer.status_code == status and said in answer.json()["error"]["message"], answer.text
    assert not server.painter.jobs


def test_the_models_are_the_model_and_it_with_each_adapter(server: Server) -> None:
    listed = server.http.get("/v1/models").json()["data"]
    assert [(each["id"], each["adapter"]) for each in listed] == [
        ("edit2", None),
        ("edit2:sketch", "sketch"),
        ("edit2:oil", "oil"),
    ]
    assert server.http.get("/v1/models/dim:oil").json()["id"] == "edit2:oil"
    assert server.http.get("/v1/models/dim:gone").status_code == 404


def test_names_and_files_are_checked_before_anything_starts(tiny_model_dir: Path) -> None:
    with pytest.raises(ConfigError, match="no name of letters"):
        read_settings(["model=m", "adapters={'a/b': x}"], {})
    gone = ServingConfig(model=str(tiny_model_dir), adapters={"gone": "nowhere/at/all"})
    with pytest.raises(CheckpointError, match="LoRA adapter not found"):
        check(gone, with_port=False)


def test_a_painter_mixes_adapters_in_one_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    specs = {
        name: str(make_adapter(tiny_model_dir, tmp_path / name, seed, train=["patch_embed"]))
        for seed, name in enumerate(("sketch", "oil"))
    }
    painter = PainterDeployment(ServingConfig(model=str(tiny_model_dir), adapters=specs))

    async def paint(adapter: str | None) -> tuple[np.ndarray, int]:
        job = GenerateJob(
            prompt="a star", size=(64, 64), seed=5, steps=30, guidance_scale=2.0, adapter=adapter
        )
        (painted,) = [piece async for piece in painter.paint(job)]
        assert isinstance(painted, Painted)
        return np.asarray(Image.open(io.BytesIO(painted.data))), painted.batch_size

    async def together() -> list[tuple[np.ndarray, int]]:
        return await asyncio.gather(*map(paint, ("sketch", None, "oil")))

    mixed = asyncio.run(together())
    assert [size for _, size in mixed] == [3, 3, 3]
    for (image, _), adapter in zip(mixed, ("sketch", None, "oil"), strict=True):
        assert np.array_equal(image, asyncio.run(paint(adapter))[0])
        model: DIM = models.load(tiny_model_dir, lora=[specs[adapter]] if adapter else [])
        merged = model.generate(["a star"], seeds=[5], steps=30, guidance_scale=2.0)[0]
        assert np.abs(np.asarray(merged, dtype=int) - image).max() <= 1
    assert not np.array_equal(mixed[0][0], mixed[2][0])


def test_a_painter_with_a_step_cache_paints_as_the_model_with_one(tiny_model_dir: Path) -> None:
    painter = PainterDeployment(ServingConfig(model=str(tiny_model_dir), step_cache=0.5))

    async def paint() -> Image.Image:
        job = GenerateJob(prompt="a", size=(64, 64), seed=5, steps=8, guidance_scale=1.0)
        (painted,) = [piece async for piece in painter.paint(job)]
        assert isinstance(painted, Painted)
        return Image.open(io.BytesIO(painted.data))

    image = asyncio.run(paint())
    model = models.load(tiny_model_dir)
    whole, short = (
        each.generate(["a"], seeds=[5], steps=8, guidance_scale=1.0)[0]
        for each in (model, models.load(tiny_model_dir).speed_up(step_cache=0.5))
    )
    assert image.tobytes() == short.tobytes() != whole.tobytes()
