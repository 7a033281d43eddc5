"""The painter deployment: edits and generations, each painted a batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray import serve

from dim import model as models
from dim.devices import best_device
from dim.images import decode_image, encode_png
from infra.models import on_this_machine
from serving.config import ServingConfig
from serving.jobs import Defaults, EditJob, GenerateJob, Painted, in_groups, unwrap


class PainterDeployment:
    """Holds one DIM and paints with it. One batch is on the device at any time."""

    def __init__(self, config: ServingConfig) -> None:
        self._model = models.load(
            on_this_machine(config.model),
            device=best_device(),
            dtype=config.dtype,
            lora=config.lora,
        )
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
        )

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
        results = self._model.edit(
            [decode_image(job.image) for job in jobs],
            texts,
            blueprints=texts,
            fit=jobs[0].fit,
            seeds=[job.seed for job in jobs],
            steps=jobs[0].steps,
            guidance_scale=[job.guidance_scale for job in jobs],
            batch_size=len(jobs),
        )
        return [Painted(encode_png(result.image), len(jobs)) for result in results]

    def _generate_same(self, jobs: Sequence[GenerateJob]) -> list[Painted]:
        images = self._model.generate(
            [job.prompt for job in jobs],
            size=jobs[0].size,
            seeds=[job.seed for job in jobs],
            steps=jobs[0].steps,
            guidance_scale=[job.guidance_scale for job in jobs],
            batch_size=len(jobs),
        )
        return [Painted(encode_png(image), len(jobs)) for image in images]
