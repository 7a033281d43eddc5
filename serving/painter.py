"""The painter deployment: edits and generations, each painted a batch at a time."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from PIL import Image
from ray import serve

from dim import model as models
from dim.devices import best_device
from dim.images import decode_image
from infra.models import fingerprint, on_this_machine
from serving.config import ServingConfig
from serving.encoding import encode
from serving.jobs import Defaults, EditJob, GenerateJob, Painted, in_groups, unwrap
from serving.usage import image_tokens, text_tokens


class PainterDeployment:
    """Holds one DIM and paints with it. One batch is on the device at any time."""

    def __init__(self, config: ServingConfig) -> None:
        self._model = models.load(
            on_this_machine(config.model),
            device=best_device(),
            dtype=config.dtype,
            lora=config.lora,
        )
        self._model_hash = fingerprint(config.model)
        self._warm = False
        self._worker = ThreadPoolExecutor(max_workers=1)
        batched = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s
        )
        self._edit_batched = batched(self._edit_batch)
        self._generate_batched = batched(self._generate_batch)

    def defaults(self) -> Defaults:
        """What the model does unless a request says otherwise."""
        sampling = self._model.config.sampling
        return Defaults(
            resolution=sampling.resolution,
            size_multiple=self._model.cell,
            steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            image_tokens=image_tokens(self._model),
            model_hash=self._model_hash,
        )

    async def warm(self) -> None:
        """Return once this replica has painted an image: what is slow the first time was then."""
        if not self._warm:
            side = self._model.config.sampling.resolution
            job = GenerateJob(
                prompt="a warm-up", size=(side, side), seed=0, steps=1, guidance_scale=1.0
            )
            async for _ in self.paint(job):
                self._warm = True

    def count_tokens(self, texts: Sequence[str]) -> int:
        """Tokens that the understanding model reads of ``texts`` together."""
        return text_tokens(self._model, texts)

    async def paint(self, job: EditJob | GenerateJob) -> AsyncIterator[Painted]:
        """Paint one image; others that wait with the same settings are painted along with it."""
        if isinstance(job, EditJob):
            yield unwrap(await self._edit_batched(job))
        else:
            yield unwrap(await self._generate_batched(job))

    async def _edit_batch(self, jobs: list[EditJob]) -> list[Painted | Exception]:
        return await self._off_the_loop(self._edit_all, jobs)

    async def _generate_batch(self, jobs: list[GenerateJob]) -> list[Painted | Exception]:
        return await self._off_the_loop(self._generate_all, jobs)

    async def _off_the_loop(self, work: Callable, jobs: Sequence) -> list[Painted | Exception]:
        # The event loop stays free to collect the next batch and to answer health checks.
        return await asyncio.get_running_loop().run_in_executor(self._worker, work, jobs)

    def _edit_all(self, jobs: Sequence[EditJob]) -> list[Painted | Exception]:
        return in_groups(jobs, lambda job: (job.steps, job.fit), self._edit_same)

    def _generate_all(self, jobs: Sequence[GenerateJob]) -> list[Painted | Exception]:
        return in_groups(jobs, lambda job: (job.size, job.steps), self._generate_same)

    def _edit_same(self, jobs: Sequence[EditJob]) -> list[Painted]:
        texts = [job.text for job in jobs]
        sources = [decode_image(job.image) for job in jobs]
        results = self._model.edit(
            sources,
            texts,
            blueprints=texts,
            fit=jobs[0].fit,
            seeds=[job.seed for job in jobs],
            steps=jobs[0].steps,
            guidance_scale=[job.guidance_scale for job in jobs],
            negative_prompt=[job.negative_prompt for job in jobs],
            batch_size=len(jobs),
        )
        return [
            Painted(encode(within_mask(result.image, source, job.mask), job.output), len(jobs))
            for result, source, job in zip(results, sources, jobs, strict=True)
        ]

    def _generate_same(self, jobs: Sequence[GenerateJob]) -> list[Painted]:
        images = self._model.generate(
            [job.prompt for job in jobs],
            size=jobs[0].size,
            seeds=[job.seed for job in jobs],
            steps=jobs[0].steps,
            guidance_scale=[job.guidance_scale for job in jobs],
            negative_prompt=[job.negative_prompt for job in jobs],
            batch_size=len(jobs),
        )
        return [
            Painted(encode(image, job.output), len(jobs))
            for image, job in zip(images, jobs, strict=True)
        ]


def within_mask(painted: Image.Image, source: Image.Image, mask: bytes | None) -> Image.Image:
    """``painted`` where the mask is 255, the very pixels of ``source`` where it is 0."""
    if mask is None:
        return painted
    return Image.composite(painted, source, Image.open(io.BytesIO(mask), formats=["PNG"]))
