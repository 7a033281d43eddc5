"""The ingress's routes with a designer and a painter that need no Ray and no model."""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any
from unittest import mock

from fastapi.testclient import TestClient
from PIL import Image

from dim.design import Reply
from dim.images import encode_png
from serving.app import Ingress
from serving.config import ServingConfig
from serving.contributions import Contributions
from serving.encoding import encode
from serving.jobs import Defaults, DesignJob, EditJob, GenerateJob, Painted, Preview, ReviewJob
from serving.painter import signed, texts_of
from serving.release import Release
from serving.shipping import received

RELEASE = Release("runs/edit2/model", "edit2@cafe", "cafe")
DEFAULTS = Defaults(
    resolution=64,
    size_multiple=16,
    steps=5,
    guidance_scale=2.0,
    image_tokens=16,
    edits=True,
    release=RELEASE.name,
    model_hash=RELEASE.model_hash,
)
BLUEPRINT = "\n\n".join(
    f"{number}. {title}: {title.lower()} of it"
    for number, title in enumerate(
        (
            "Edit Instruction",
            "Global Layout Perception",
            "Local Object Perception",
            "Edit Area Localization",
            "Edited Image Imagination",
        ),
        1,
    )
)


class Streamed:
    """What a streaming method answers, as Serve's handles give it."""

    def __init__(self, pieces: AsyncIterator[Any]) -> None:
        self._pieces = pieces
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self._pieces

    def cancel(self) -> None:
        self.cancelled = True


class Method:
    """A deployment's method, with ``remote`` as Serve's handles have it."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def remote(self, *arguments: Any) -> Any:
        answer = self._call(*arguments)
        return Streamed(answer) if isinstance(answer, AsyncIterator) else answer


class FakeDesigner:
    """Writes ``pieces``, then raises ``error`` if there is one."""

    def __init__(self) -> None:
        self.jobs: list[DesignJob] = []
        self.pieces: Sequence[str] = (BLUEPRINT[:40], BLUEPRINT[40:])
        self.error: Exception | None = None
        self.write = Method(self._write)
        self.reviews: list[Reply] = []
        self.looks: list[ReviewJob] = []
        self.review = Method(self._review)

    def options(self, **_: object) -> FakeDesigner:
        return self

    async def _review(self, job: ReviewJob) -> Reply:
        self.looks.append(job)
        return self.reviews.pop(0)

    async def _write(self, job: DesignJob) -> AsyncIterator[str]:
        self.jobs.append(job)
        for piece in self.pieces:
            yield piece
        if self.error is not None:
            raise self.error


class FakePainter:
    """Paints every image grey, of the size that is asked for; raises ``error`` if there is one."""

    def __init__(self) -> None:
        self.jobs: list[EditJob | GenerateJob] = []
        self.error: Exception | None = None
        self.defaults = Method(self._defaults)
        self.paint = Method(self._paint)
        self.release = RELEASE  # what its images say that painted them
        self.warm = Method(self._warm)

    def options(self, **_: object) -> FakePainter:
        return self

    async def _defaults(self) -> Defaults:
        return DEFAULTS

    async def _warm(self) -> None:
        if self.error is not None:
            raise self.error

    async def _paint(self, job: EditJob | GenerateJob) -> AsyncIterator[Preview | Painted]:
        self.jobs.append(job)
        size, output = await self._size(job), signed(job.output, self.release)
        for number in range(job.previews):
            yield Preview(number, encode(Image.new("RGB", size, "white"), output))
        if self.error is not None:
            raise self.error
        words = len(" ".join(texts_of(job)).split())
        yield Painted(encode(Image.new("RGB", size, "grey"), output), 1, words, RELEASE.name)

    async def _size(self, job: EditJob | GenerateJob) -> tuple[int, int]:
        if isinstance(job, GenerateJob):
            return job.size
        return (64, 64) if job.fit == "square" else opened(await received(job.image)).size


class Server:
    """The application, and what its parts were asked."""

    def __init__(self, **settings: Any) -> None:
        self.designer, self.painter = FakeDesigner(), FakePainter()
        config = ServingConfig(model="runs/edit2/model", **settings)
        holder = None
        if config.contributions is not None:
            held = self.contributions = Contributions(config.contributions)
            holder = self.holder = mock.Mock()
            for name in ("hold", "accept", "forget"):
                setattr(holder, name, Method(getattr(held, name)))
        with mock.patch("serving.app.listening_host", lambda: "127.0.0.1"):  # Serve is not there
            ingress = Ingress(
                config,
                self.designer,
                self.painter,
                contributions=holder,  # type: ignore[arg-type]
            )
        self.app = ingress.__serve_build_asgi_app__()
        self.renew = lambda: asyncio.run(ingress.renew())
        self.http = TestClient(self.app, base_url="http://localhost")


def opened(data: bytes | str) -> Image.Image:
    """An encoded picture, or one in base64."""
    return Image.open(io.BytesIO(base64.b64decode(data) if isinstance(data, str) else data))


def picture(width: int = 48, height: int = 32, colour: Any = (200, 30, 30)) -> bytes:
    return encode_png(Image.new("RGB", (width, height), colour))


def data_url(data: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}
