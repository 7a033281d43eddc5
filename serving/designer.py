"""The designer deployment: instructions and images in, blueprints out, a batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from ray import serve

from dim import model as models
from dim.blueprint import Blueprint
from dim.designers import Designer, DesignRequest, Reply, create
from dim.designers.self_play import SelfDesigner
from dim.devices import best_device
from dim.errors import BlueprintError, DesignerError
from dim.redaction import redact
from infra.models import on_this_machine
from serving.config import NO_DESIGNER, ServingConfig
from serving.jobs import DesignJob, in_groups, unwrap


class DesignerDeployment:
    """Holds every designer that the server offers and writes blueprints with them."""

    def __init__(self, config: ServingConfig) -> None:
        self._designers = {
            redact(spec): create_for(spec, config)
            for spec in config.designers
            if spec != NO_DESIGNER
        }
        self._worker = ThreadPoolExecutor(max_workers=1)
        batched = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s
        )
        self._design_batched = batched(self._design_batch)

    async def design(self, job: DesignJob) -> str:
        """The blueprint for ``job``, in the paper's grammar.

        Raises:
            DesignerError: the designer failed, or its answer is not a blueprint.
        """
        return unwrap(await self._design_batched(job))

    async def write(self, job: DesignJob) -> AsyncIterator[str]:
        """The blueprint of ``design`` in pieces, as far as the designer tells them one by one."""
        yield await self.design(job)

    async def _design_batch(self, jobs: list[DesignJob]) -> list[str | Exception]:
        # Off the event loop, which goes on filling the next batch meanwhile.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._design_all, jobs)

    def _design_all(self, jobs: Sequence[DesignJob]) -> list[str | Exception]:
        return in_groups(jobs, lambda job: job.designer, self._design_same)

    def _design_same(self, jobs: Sequence[DesignJob]) -> list[str | Exception]:
        designer = self._designers[jobs[0].designer]
        requests = [DesignRequest(job.instruction, job.image) for job in jobs]
        answers = designer.design(requests)
        return [checked(*pair, designer.name) for pair in zip(jobs, answers, strict=True)]


def create_for(spec: str, config: ServingConfig) -> Designer:
    """The designer of ``spec``, where ``self`` is the served model's own understanding."""
    if spec != "self":
        return create(spec)
    model = models.load(on_this_machine(config.model), device=best_device(), dtype=config.dtype)
    return SelfDesigner(model, name="self")


def checked(job: DesignJob, answer: Reply, designer: str) -> Reply:
    """A designer's answer as a clean blueprint; anything else as the error that it is."""
    if isinstance(answer, DesignerError):
        return answer
    try:
        return Blueprint.parse(answer, instruction=job.instruction).render()
    except BlueprintError as error:
        return DesignerError(f"designer {designer} did not answer with a blueprint: {error}")
