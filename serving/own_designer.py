"""The deployment of designers that are models of ours, which are asked a batch at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass

from ray import serve

from dim.designers import DesignRequest, Reply
from dim.designers.self_play import SelfDesigner
from dim.devices import best_device
from dim.model.checkpoint.understanding import load_understanding
from dim.model.dim import floating_type
from infra.models import on_this_machine
from serving.config import ServingConfig
from serving.designer import as_written, in_time
from serving.jobs import DesignJob, in_groups, unwrap
from serving.release import Holder, Release, find_release
from serving.shipping import received


class OwnDesigner:
    """Writes blueprints with understanding models of ours: of each nothing else is loaded.

    Args:
        config: of the server; ``max_batch_size`` is this pool's.
        names: of the designers of ``config.designers`` that this pool holds.
        release: of the served model; default is what ``config.model`` means now.
        key: of the application, see ``serving.release``.
    """

    def __init__(
        self,
        config: ServingConfig,
        names: Sequence[str],
        release: Release | None = None,
        key: str = "",
    ) -> None:
        self._config = config
        folders = {name: folder_of(config.designers[name].spec) for name in names}
        self._others = {
            name: load_own(folder, config) for name, folder in folders.items() if folder
        }
        self._holder: Holder[SelfDesigner] | None = None
        if len(self._others) < len(names):
            first = release or find_release(config.model)
            self._holder = Holder(key, first, lambda each: load_own(each.address, config))
        self._worker = ThreadPoolExecutor(max_workers=1)
        batched = serve.batch(
            max_batch_size=config.max_batch_size, batch_wait_timeout_s=config.batch_wait_s
        )
        self._design_batched = batched(self._design_batch)

    async def prepare(self, release: Release) -> None:
        """Load the understanding model of ``release`` beside the one that works."""
        if self._holder is not None:
            await asyncio.to_thread(self._holder.prepare, release)

    async def adopt(self, release: Release) -> None:
        """Design with ``release`` from the next batch on."""
        if self._holder is not None:
            await asyncio.to_thread(self._holder.adopt, release)

    async def discard(self) -> None:
        """Let go of what was prepared."""
        if self._holder is not None:
            await asyncio.to_thread(self._holder.discard)

    async def check_health(self) -> None:
        """Move on to the release that was written down, if it was not told to."""
        if self._holder is not None:
            self._holder.follow_soon()

    async def write(self, job: DesignJob) -> AsyncIterator[str]:
        """The blueprint for ``job`` in the paper's grammar, in pieces while it is written.

        Raises:
            DesignerError: the designer failed, or its answer is not a blueprint; in words that a
                client may read.
        """
        patience_s = self._config.designers[job.designer].patience_s(self._config.request_timeout_s)
        asked = Asked(job, await received(job.image))
        answer = in_time(job, self._answer(asked), patience_s)
        async with aclosing(as_written(job, asked, answer)) as pieces:
            async for piece in pieces:
                yield piece

    async def _answer(self, asked: Asked) -> Reply:
        return unwrap(await self._design_batched(asked))

    async def _design_batch(self, asked: list[Asked]) -> list[Reply | Exception]:
        # Off the event loop, which goes on filling the next batch meanwhile.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._design_all, asked)

    def _design_all(self, asked: Sequence[Asked]) -> list[Reply | Exception]:
        return in_groups(asked, lambda each: each.job.designer, self._design_same)

    def _design_same(self, asked: Sequence[Asked]) -> list[Reply | Exception]:
        designer = self._others.get(asked[0].job.designer)
        if designer is None:
            assert self._holder is not None
            designer = self._holder.held.model
        requests = [DesignRequest(each.job.instruction, each.image) for each in asked]

        def told(place: int, words: str) -> None:
            asked[place].words = words

        return list(designer.design(requests, on_text=told))


@dataclass
class Asked:
    """A job in a batch, and what the designer has written of its answer so far."""

    job: DesignJob
    image: bytes
    words: str = ""


def folder_of(spec: str) -> str:
    """The folder of ``self:FOLDER``; empty for ``self``, the served model's own understanding."""
    return spec.partition(":")[2]


def load_own(address: str, config: ServingConfig) -> SelfDesigner:
    """The understanding model in the model folder at ``address`` as a designer."""
    path = on_this_machine(address)
    dtype = floating_type(config.dtype)
    return SelfDesigner(load_understanding(path, device=best_device(), dtype=dtype))
