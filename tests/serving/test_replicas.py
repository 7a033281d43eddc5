"""A job on replicas that die, and what a painter gives back of one; without a cluster."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.exceptions import RayActorError

from dim.errors import InputError
from dim.images import encode_png
from serving.config import ServingConfig
from serving.encoding import Output
from serving.engine import Engine
from serving.jobs import EditJob, GenerateJob, Painted, Preview
from serving.painter import PainterDeployment
from serving.replicas import paint
from serving.usage import text_tokens

JOB = GenerateJob(prompt="a circle", size=(64, 64), seed=1, steps=3, guidance_scale=1.0, previews=2)
FIRST, SECOND, LAST = Preview(0, b"a"), Preview(1, b"b"), Painted(b"c", 1, 4, "a")
Piece = Preview | Painted | Exception


class Stream:
    """What a handle answers: pieces, of which an error is raised."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces, self.cancelled = pieces, False

    async def __aiter__(self) -> AsyncIterator[Preview | Painted]:
        for piece in self.pieces:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """A painter's handle whose replicas answer ``tries``, one after the other."""

    def __init__(self, *tries: Sequence[Piece]) -> None:
        self.streams = [Stream(pieces) for pieces in tries]
        self.asked: list[Stream] = []

    @property
    def paint(self) -> Handle:
        return self

    def options(self, *, stream: bool) -> Handle:
        assert stream
        return self

    def remote(self, job: GenerateJob) -> Stream:
        assert job == JOB
        self.asked.append(self.streams[len(self.asked)])
        return self.asked[-1]


def of(handle: Any, most: int = 10) -> list[Preview | Painted]:
    """The first pieces of a job on ``handle``."""

    async def gather() -> list[Preview | Painted]:
        pieces, stream = [], paint(handle, JOB)
        async for piece in stream:
            pieces.append(piece)
            if len(pieces) == most:
                break
        await stream.aclose()  # type: ignore[attr-defined]
        return pieces

    return asyncio.run(gather())


def test_a_lost_replica_is_replaced_and_previews_are_sent_once() -> None:
    handle = Handle([FIRST, RayActorError()], [FIRST, SECOND, LAST])
    assert of(handle) == [FIRST, SECOND, LAST]
    assert len(handle.asked) == 2


@pytest.mark.parametrize(
    ("tries", "asked", "error"),
    [
        ([[RayActorError()], [FIRST, RayActorError()]], 2, RayActorError),
        ([[InputError("a bad prompt")]], 1, InputError),
        ([[TimeoutError()]], 1, TimeoutError),
    ],
)
def test_a_second_loss_and_any_other_error_are_raised(
    tries: list[list[Piece]], asked: int, error: type[Exception]
) -> None:
    handle = Handle(*tries)
    with pytest.raises(error):
        of(handle)
    assert len(handle.asked) == asked


def test_who_stops_listening_cancels_the_stream() -> None:
    handle = Handle([FIRST, SECOND, LAST])
    assert of(handle, most=1) == [FIRST]
    assert handle.asked[0].cancelled


@pytest.fixture(scope="module")
def painter(tiny_model_dir: Path) -> PainterDeployment:
    return PainterDeployment(ServingConfig(model=str(tiny_model_dir)))


async def pieces(painter: PainterDeployment, job: EditJob) -> list[Preview | Painted]:
    return [piece async for piece in painter.paint(job)]


def test_a_masked_edit_keeps_the_sources_pixels_in_image_and_previews(
    painter: PainterDeployment,
) -> None:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (70, 90, 3), dtype=np.uint8)
    mask = np.zeros((70, 90), dtype=np.uint8)
    mask[20:50, 30:61] = 255
    job = EditJob(
        image=encode_png(Image.fromarray(source)),
        text="remove it",
        fit="source",
        mask=encode_png(Image.fromarray(mask)),
        seed=1,
        steps=3,
        guidance_scale=1.0,
        previews=1,
        output=Output("webp"),
    )
    preview, painted = asyncio.run(pieces(painter, job))
    assert isinstance(preview, Preview) and isinstance(painted, Painted)
    assert painted.text_tokens == text_tokens(painter._holder.held.model.model, ["remove it"]) > 0
    for data in (preview.data, painted.data):
        image = np.asarray(Image.open(io.BytesIO(data), formats=("WEBP",)))
        assert np.array_equal(image[mask == 0], source[mask == 0])
        assert (image[mask == 255] != source[mask == 255]).any()


def test_a_stream_that_is_closed_frees_its_place(painter: PainterDeployment) -> None:
    engine: Engine = painter._holder.held.model.engine

    async def leave() -> None:
        job = GenerateJob(
            prompt="a", size=(64, 64), seed=1, steps=5000, guidance_scale=1.0, previews=500
        )
        stream = painter.paint(job)
        async for piece in stream:
            assert isinstance(piece, Preview)
            break
        assert engine.load().running == 1
        await stream.aclose()  # type: ignore[attr-defined]
        while engine.load().running:  # noqa: ASYNC110, the engine knows no event loop
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), timeout=30))
    steps = engine.load().steps
    assert 0 < steps < 1000


def test_a_replica_is_warm_healthy_and_says_what_it_does(painter: PainterDeployment) -> None:
    painter.warm()
    asyncio.run(painter.check_health())
    assert (painter.load().running, painter.load().waiting) == (0, 0)
