"""The HTTP side: every route, and how a request goes from designer to painter.

POST /v1/images/edits        multipart: image, prompt; OpenAI's fields, and designer, blueprint, …
POST /v1/images/generations  JSON: prompt; OpenAI's fields
GET  /healthz                is every part ready, and what is served
GET  /                       the page (serving/page)
"""

# Annotations stay real objects in this module: Serve ships the routes to the replicas by value, and
# FastAPI could not look their names up there.

import asyncio
import contextlib
from collections.abc import Coroutine
from functools import partial
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from dim import __version__
from dim.config import validate_config
from dim.errors import InputError
from dim.images import decode_image, encode_png, parse_size
from dim.model.config import Fit
from dim.redaction import redact
from serving import page
from serving.admission import Admission
from serving.config import NO_DESIGNER, ServingConfig
from serving.designer import DesignerDeployment
from serving.errors import BadRequestError, OpenAIErrorRoute, on_http_error
from serving.jobs import Defaults, DesignJob, EditJob, GenerateJob
from serving.painter import PainterDeployment
from serving.replicas import running_replicas, together, whole
from serving.requests import EditRequest, PaintRequest, read_edit, read_json
from serving.responses import respond, seeds, settings

app = FastAPI(title="Draw-In-Mind", version=__version__)
app.router.route_class = OpenAIErrorRoute
app.add_exception_handler(HTTPException, on_http_error)
app.router.routes.extend(page.routes)


@serve.ingress(app)
class Ingress:
    """Checks requests, asks the designer, hands the painter its text, answers."""

    def __init__(
        self,
        config: ServingConfig,
        designer: DeploymentHandle,
        painter: DeploymentHandle,
    ) -> None:
        self._config = config
        self._designer = designer.options(stream=True)
        self._painter = painter
        self._admission = Admission(config.max_pending)
        self._painter_defaults: Defaults | None = None

    @app.post("/v1/images/edits")
    async def edits(self, request: Request) -> Response:
        """Edit one image: image → blueprint → painted image, as base64 PNG and the blueprint."""
        self._admission.refuse_when_full()
        wanted, data = await read_edit(request, self._config.max_request_bytes)
        return await self._serve(wanted, self._edit(wanted, data))

    @app.post("/v1/images/generations")
    async def generations(self, request: Request) -> Response:
        """Paint images from a text, as base64 PNG."""
        self._admission.refuse_when_full()
        wanted = await read_json(request, PaintRequest, self._config.max_request_bytes)
        return await self._serve(wanted, self._generate(wanted))

    @app.get("/healthz")
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
            "pending_images": self._admission.pending,
            "max_pending_images": self._admission.limit,
        }
        return JSONResponse(body, status_code=200 if ready else 503)

    async def _edit(self, wanted: EditRequest, data: bytes) -> Response:
        designer = self._choose_designer(wanted)
        source = await asyncio.to_thread(self._read_source, data)
        defaults = await self._defaults()
        if wanted.size not in ("auto", f"{defaults.resolution}x{defaults.resolution}"):
            raise BadRequestError(
                f"size: auto edits all of the image and gives it back at its own size, "
                f"{defaults.resolution}x{defaults.resolution} its middle square; nothing else does",
                param="size",
            )
        fit: Fit = "source" if wanted.size == "auto" else "square"
        blueprint = wanted.blueprint
        if blueprint is None and designer != NO_DESIGNER:
            job = DesignJob(designer, source, wanted.prompt)
            blueprint = "".join(await whole(self._designer.write.remote(job)))
        text = blueprint or wanted.prompt
        jobs = [
            EditJob(image=source, text=text, fit=fit, seed=seed, **settings(wanted, defaults))
            for seed in seeds(wanted)
        ]
        return respond(jobs, await together(self._painter, jobs), blueprint)

    async def _generate(self, wanted: PaintRequest) -> Response:
        defaults = await self._defaults()
        size = self._generated_size(wanted, defaults)
        jobs = [
            GenerateJob(prompt=wanted.prompt, size=size, seed=seed, **settings(wanted, defaults))
            for seed in seeds(wanted)
        ]
        return respond(jobs, await together(self._painter, jobs), None)

    async def _serve(self, wanted: PaintRequest, work: Coroutine[Any, Any, Response]) -> Response:
        with contextlib.closing(work):
            if (wanted.steps or 1) > self._config.max_steps:
                raise BadRequestError(f"steps: at most {self._config.max_steps}", param="steps")
            with self._admission.admit(wanted.n):
                async with asyncio.timeout(self._config.request_timeout_s):
                    return await work

    async def _defaults(self) -> Defaults:
        if self._painter_defaults is None:
            self._painter_defaults = await self._painter.defaults.remote()
        return self._painter_defaults

    def _choose_designer(self, wanted: EditRequest) -> str:
        designer = redact(wanted.designer or self._config.designers[0])
        if designer not in self._config.offered:
            raise BadRequestError(
                f"designer: {designer!r} is not offered here; "
                f"choose from {', '.join(self._config.offered)}",
                param="designer",
            )
        return designer

    def _read_source(self, data: bytes) -> bytes:
        try:
            return encode_png(decode_image(data, max_pixels=self._config.max_image_pixels))
        except InputError as error:
            raise BadRequestError(str(error), param="image") from None

    def _generated_size(self, wanted: PaintRequest, defaults: Defaults) -> tuple[int, int]:
        if wanted.size == "auto":
            return defaults.resolution, defaults.resolution
        try:
            width, height = parse_size(wanted.size)
        except InputError as error:
            raise BadRequestError(str(error), param="size") from None
        if max(width, height) > self._config.max_side:
            raise BadRequestError(
                f"size: a side has at most {self._config.max_side} px", param="size"
            )
        if width % defaults.size_multiple or height % defaults.size_multiple:
            raise BadRequestError(
                f"size: both sides must be multiples of {defaults.size_multiple}", param="size"
            )
        return width, height


def build(args: ServingConfig | dict[str, Any]) -> Application:
    """The whole application: ``serving.app:build`` in a Serve config file, with its ``args``."""
    config = args if isinstance(args, ServingConfig) else read_args(args)
    replica = partial(
        serve.deployment,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica,
            "num_gpus": config.gpus_per_replica,
        },
        # Room for the batch that is being worked on and for the next one to fill.
        max_ongoing_requests=2 * config.max_batch_size,
        max_queued_requests=config.max_pending,
        max_constructor_retry_count=2,
    )
    designer = replica(name="designer", num_replicas=config.designer_replicas)(DesignerDeployment)
    painter = replica(name="painter", num_replicas=config.painter_replicas)(PainterDeployment)
    # The ingress refuses by itself, in OpenAI's shape; its own bounds are the last resort.
    ingress = serve.deployment(
        name="ingress",
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4 * config.max_pending,
        max_queued_requests=4 * config.max_pending,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
    )(Ingress)
    return ingress.bind(config, designer.bind(config), painter.bind(config))


def read_args(args: dict[str, Any]) -> ServingConfig:
    """``args`` of a Serve config file; a mistake is named."""
    return validate_config(ServingConfig, args, where="the application's args")
