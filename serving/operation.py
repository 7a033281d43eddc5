"""What is served, and whether it can be used: for clients that choose, and for who runs it."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from ray.serve.handle import DeploymentHandle

from dim import __version__
from serving.admission import Admission
from serving.config import ServingConfig
from serving.contributions import ContributionRoutes
from serving.guard import asking_of
from serving.names import adapter_of
from serving.protocol import Health, Model, Models
from serving.replicas import running_replicas
from serving.scrape import CONTENT_TYPE, Scrape

WARM_UP_S = 2.0
"""How long a question for readiness waits for a warm-up that is on its way."""


class Operation:
    """The routes of operation. One an ingress replica."""

    def __init__(
        self,
        config: ServingConfig,
        painter: DeploymentHandle,
        admission: Admission,
        scrape: Scrape,
        contributions: ContributionRoutes,
    ) -> None:
        self._config = config
        self._painter = painter
        self._admission = admission
        self._scrape = scrape
        self._contributions = contributions
        self._warming: asyncio.Task[None] | None = None
        self._started = int(time.time())

    async def models(self, request: Request) -> Models:
        """What is served: one model, alone and with each of its adapters."""
        adapters = (None, *self._config.adapters)
        return Models(data=[self._shown(request, adapter) for adapter in adapters])

    async def model(self, request: Request, model: str) -> Model:
        """The served model, by its name or as `dim`, or `NAME:ADAPTER`."""
        return self._shown(request, adapter_of(self._config, model))

    def _shown(self, request: Request, adapter: str | None) -> Model:
        config = self._config
        return Model(
            id=config.model_name if adapter is None else f"{config.model_name}:{adapter}",
            created=self._started,
            version=__version__,
            designers=config.offered,
            max_steps=config.max_steps,
            max_side=config.max_side,
            adapter=adapter,
            contributions=self._contributions.offered(asking_of(request).client),
        )

    async def livez(self) -> Health:
        """This process answers. Nothing else is looked at, so that nobody restarts it for that."""
        return Health(status="alive")

    async def readyz(self, response: Response) -> Health:
        """200 once every deployment has a running replica and an image was painted, else 503."""
        why = await self._why_not_ready()
        if why is None:
            return Health(status="ready")
        response.status_code = 503
        return Health(status="not ready", message=why)

    async def healthz(self) -> Response:
        """200 when every deployment has a running replica, else 503; what is served; the load."""
        parts = await asyncio.to_thread(running_replicas)
        ready = all(parts.values())
        body = {
            "status": "ready" if ready else "not ready",
            "model": self._config.model_name,
            "version": __version__,
            "designers": self._config.offered,
            "running_replicas": parts,
            "pending_images": int(self._admission.pending.images),
            "max_pending_images": int(self._admission.limit.images),
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def metrics(self) -> Response:
        """The metrics of all replicas, and Serve's, in Prometheus' text format."""
        return Response(await self._scrape.text(), media_type=CONTENT_TYPE)

    async def _why_not_ready(self) -> str | None:
        parts = await asyncio.to_thread(running_replicas)
        missing = [name for name, running in parts.items() if not running]
        if missing:
            return f"no running replica of {', '.join(missing)}"
        if self._warming is None:
            self._warming = asyncio.create_task(self._warm_up())
        await asyncio.wait([self._warming], timeout=WARM_UP_S)
        if not self._warming.done():
            return "the painter is warming up"
        if self._warming.exception() is not None:
            self._warming = None  # the next question tries again
            return "the painter failed on its warm-up; its log says why"
        return None

    async def _warm_up(self) -> None:
        response: Any = self._painter.warm.remote()
        await response
