"""The HTTP side: every route, and the deployments behind them.

POST /v1/images/edits        a form or JSON: image, prompt; OpenAI's fields, and designer, blueprint
POST /v1/images/generations  JSON: prompt; OpenAI's fields
POST /v1/blueprints          a form or JSON: image, prompt; the blueprint alone
POST /v1/blueprints/check    JSON: blueprint; is it one, else which section is wrong
GET  /v1/jobs/ID             what has become of a request with ?async=true; DELETE cancels it
POST /v1/contributions/ID/accept  JSON: an edit is as wanted, and may be kept for training
DELETE /v1/contributions/ID     it may not, or not any more
GET  /v1/models              what is served; also /v1/models/NAME
GET  /livez, /readyz         does the process answer; can it paint
GET  /healthz                is every part running, and how much work is in
GET  /metrics                Prometheus' text, of all replicas
GET  /docs, /openapi.json    the same for people and for generators of clients
GET  /                       the page (serving/page)
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.exceptions import HTTPException

from dim import __version__
from dim.config import validate_config
from dim.errors import ConfigError
from serving import account, page
from serving.access import Observed, open_log
from serving.admission import Admission, room
from serving.background import Background, How, fingerprint, read_how
from serving.body_limit import BodyLimit
from serving.checks import check
from serving.config import ServingConfig
from serving.contributions import ContributionRoutes
from serving.errors import (
    BadRequestError,
    OpenAIErrorRoute,
    error_response,
    on_http_error,
    on_invalid_body,
)
from serving.events import Tell, stream
from serving.exposure import check_exposure, listening_host
from serving.guard import Guard, Guarded, asking_of
from serving.metrics import RequestMetrics
from serving.openapi import BLUEPRINT, EDIT, ERRORS, describe
from serving.operation import Operation
from serving.protocol import (
    AcceptRequest,
    Asked,
    BlueprintResponse,
    CheckRequest,
    CheckResponse,
    ContributionAnswer,
    ErrorResponse,
    GenerationRequest,
    Health,
    ImagesResponse,
    Job,
)
from serving.replicas import Designers
from serving.requests import Design, Edit, read_design, read_edit
from serving.result_cache import HEADER, ResultCache
from serving.scrape import Scrape
from serving.studio import Studio, Weighed
from serving.work import Work

LATER: dict[int | str, dict[str, Any]] = {
    202: {"model": Job, "description": "With `async=true`: the job that was begun."}
}
SERVES_OWN = {
    "host": "http_options.host",
    "port": "http_options.port",
    "tracing": "tracing_config",
    "application": "the application's name",
    "route_prefix": "the application's route_prefix",
}
"""Settings of ``dim serve`` that a Serve config file has elsewhere, where Serve reads them."""

Answering = Annotated[How, Depends(read_how)]
RequestT = TypeVar("RequestT", Edit, GenerationRequest, Design)


class Ingress:
    """Lets requests in, has the studio do them, answers."""

    def __init__(
        self,
        config: ServingConfig,
        designer: Designers,
        painter: DeploymentHandle,
        meter: DeploymentHandle | None = None,
        contributions: DeploymentHandle | None = None,
    ) -> None:
        check_exposure(config, listening_host())
        self.guard = Guard(config, meter)
        self._config = config
        self._log = open_log(config.access_log)
        self._contributions = ContributionRoutes(contributions)
        self._studio = Studio(config, designer, painter, self._contributions)
        self._admission = Admission(room(config))
        self._background = Background(config)
        self._results = ResultCache(config.result_cache_bytes)
        self._counted = RequestMetrics()
        self._operation = Operation(
            config, painter, self._admission, Scrape(self._counted.own), self._contributions
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """The routes. Serve asks for them in the replica, where the configuration is known."""
        app = FastAPI(
            title="Draw-In-Mind",
            version=__version__,
            responses=ERRORS,
            # Serve's spans reach from here to the painter; FastAPI's would begin a trace of their
            # own, and log what clients send.
            telemetry={"tracing": False, "metrics": False, "logs": False},
        )
        app.add_middleware(BodyLimit, max_bytes=self._config.max_request_bytes)
        app.add_middleware(Guarded, guard=self.guard)
        # The last one added is the first met.
        app.add_middleware(Observed, log=self._log, counted=self._counted)
        app.add_exception_handler(HTTPException, on_http_error)
        app.add_exception_handler(RequestValidationError, on_invalid_body)
        app.state.admission = self._admission

        images = APIRouter(prefix="/v1/images", route_class=AdmittingRoute, tags=["images"])
        answers: Any = {"response_model": ImagesResponse, "responses": LATER}
        images.post("/edits", **answers, openapi_extra=EDIT)(self.edits)
        images.post("/generations", **answers)(self.generations)
        app.include_router(images)

        blueprints = APIRouter(route_class=AdmittingRoute, tags=["blueprints"])
        blueprints.post(
            "/v1/blueprints",
            response_model=BlueprintResponse,
            responses=LATER,
            openapi_extra=BLUEPRINT,
        )(self.blueprints)
        app.include_router(blueprints)
        checks = APIRouter(route_class=OpenAIErrorRoute, tags=["blueprints"])
        checks.post("/v1/blueprints/check")(self.check_blueprint)
        app.include_router(checks)

        jobs = APIRouter(prefix="/v1/jobs", route_class=OpenAIErrorRoute, tags=["jobs"])
        jobs.get("/{id}", response_model=Job)(self.job)
        jobs.delete("/{id}", response_model=Job)(self.cancel_job)
        app.include_router(jobs)

        contributions = APIRouter(
            prefix="/v1/contributions", route_class=OpenAIErrorRoute, tags=["contributions"]
        )
        contributions.post("/{id}/accept")(self.accept)
        contributions.delete("/{id}")(self._contributions.forget)
        app.include_router(contributions)

        operation = APIRouter(route_class=OpenAIErrorRoute, tags=["operation"])
        operation.get("/v1/models")(self._operation.models)
        operation.get("/v1/models/{model}")(self._operation.model)
        operation.get("/livez")(self._operation.livez)
        operation.get("/readyz", responses={503: {"model": Health}})(self._operation.readyz)
        operation.get("/healthz", response_class=JSONResponse)(self._operation.healthz)
        operation.get("/metrics", response_class=PlainTextResponse)(self._operation.metrics)
        app.include_router(operation)
        app.router.routes.extend(page.routes)
        return describe(app)

    async def renew(self) -> None:
        """Ask the painter anew what it does: it has moved to another model."""
        self._studio.renew()

    async def edits(
        self, request: Request, edit: Annotated[Edit, Depends(read_edit)], how: Answering
    ) -> Response:
        """Edit one image: image → blueprint → painted image."""
        fields = self._contributions.settled(edit.fields, asking_of(request).client)
        return await self._serve(
            request, fields, self._studio.edit, replace(edit, fields=fields), how
        )

    async def generations(
        self, request: Request, wanted: GenerationRequest, how: Answering
    ) -> Response:
        """Paint images from a text."""
        return await self._serve(request, wanted, self._studio.generate, wanted, how)

    async def blueprints(
        self, request: Request, design: Annotated[Design, Depends(read_design)], how: Answering
    ) -> Response:
        """Have the blueprint of an edit written, without painting it."""
        return await self._serve(request, design.fields, self._studio.design, design, how)

    async def check_blueprint(self, wanted: CheckRequest) -> CheckResponse:
        """Whether a text is a blueprint; if not, what is wrong and in which section."""
        return await asyncio.to_thread(check, wanted)

    async def job(self, id: str) -> Response:
        """What has become of an asynchronous job."""
        return await as_json(await self._background.find(id))

    async def cancel_job(self, id: str) -> Response:
        """End an asynchronous job."""
        return await as_json(await self._background.cancel(id))

    async def accept(self, id: str, accepted: AcceptRequest | None = None) -> ContributionAnswer:
        """Say that an edit is as wanted, so that it is kept; perhaps with a better blueprint."""
        blueprint = None if accepted is None else accepted.blueprint
        return await self._contributions.accept(id, blueprint)

    async def _serve(
        self,
        request: Request,
        wanted: Asked,
        do: Callable[[RequestT, Weighed, Tell | None], Awaitable[BaseModel]],
        asked: RequestT,
        how: How,
    ) -> Response:
        account.current().prompt = wanted.prompt
        weighed = await self._studio.weigh(asked)

        async def limited(tell: Tell | None) -> BaseModel:
            async with asyncio.timeout(self._config.request_timeout_s):
                return await do(asked, weighed, tell)

        async def admitted(tell: Tell | None) -> BaseModel:
            with await self._places(request, weighed.work):
                return await limited(tell)

        if how.later or how.key is not None:
            param = "async" if how.later else "Idempotency-Key"
            if wanted.stream:
                raise BadRequestError(f"stream: it does not go with {param}", param="stream")
            self._background.check(param)
            places = await self._places(request, weighed.work)
            return await self._keep(wanted, places, partial(limited, None), asked, how)
        if wanted.stream:
            return await stream(admitted)
        key = self._results.key(asked, weighed.release)
        kept = self._results.get(key)
        if kept is not None:
            return Response(kept, headers={HEADER: "HIT"}, media_type="application/json")
        answer = await admitted(None)
        response = await as_json(answer, headers=None if key is None else {HEADER: "MISS"})
        if painted_by(answer, weighed.release):
            self._results.put(key, bytes(response.body))
        return response

    async def _places(self, request: Request, work: Work) -> contextlib.ExitStack:
        """Places for ``work``, which its client has asked for; closed, they are free again."""
        with contextlib.ExitStack() as places:
            places.enter_context(self._admission.admit(work))
            await self.guard.charge(request, work)
            account.current().admit(work)
            return places.pop_all()

    async def _keep(
        self,
        wanted: Asked,
        places: contextlib.ExitStack,
        work: Callable[[], Awaitable[BaseModel]],
        request: Edit | GenerationRequest | Design,
        how: How,
    ) -> Response:
        """Do a request as a job; answer with it, or with what comes of it where that is wanted."""
        pictures = () if isinstance(request, GenerationRequest) else request.pictures
        job = await self._background.start(
            work, places.close, fingerprint(wanted, *pictures), how.key
        )
        if how.later:
            return await as_json(job, 202, {"Location": f"/v1/jobs/{job.id}"})
        job, status = await self._background.answer(job.id)
        if job.error is not None:
            # The same key is answered the same, so that it is of no use to ask again.
            return await as_json(
                ErrorResponse(error=job.error), status, {"X-Should-Retry": "false"}
            )
        assert job.result is not None
        return await as_json(job.result)


def painted_by(answer: BaseModel, release: str) -> bool:
    """Whether all images of an answer are this model's, and none of one that took over since."""
    return isinstance(answer, ImagesResponse) and all(
        image.release == release for image in answer.data
    )


async def as_json(answer: BaseModel, status: int = 200, headers: Any = None) -> Response:
    """``answer`` as a response. Megabytes of base64 are written off the event loop."""
    body = await asyncio.to_thread(answer.model_dump_json)
    return Response(body, status, headers, media_type="application/json")


class AdmittingRoute(OpenAIErrorRoute):
    """A route that refuses what there is no room for before anything of its body is read."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As of ``OpenAIErrorRoute``."""
        handle = super().get_route_handler()

        async def admitting(request: Request) -> Response:
            admission: Admission = request.app.state.admission
            try:
                admission.refuse_when_full()
            except Exception as error:
                return error_response(error)
            return await handle(request)

        return admitting


def build(args: ServingConfig | dict[str, Any]) -> Application:
    """The whole application: ``serving.app:build`` in a Serve config file, with its ``args``."""
    # Not at the top: the models come with them, of which this entry's own process needs none.
    from serving.deployments import application
    from serving.release import find_release

    config = args if isinstance(args, ServingConfig) else read_args(args)
    return application(config, find_release(config.model), serve.ingress()(Ingress))


def read_args(args: dict[str, Any]) -> ServingConfig:
    """``args`` of a Serve config file; a mistake is named."""
    for name, where in SERVES_OWN.items():
        if name in args:
            raise ConfigError(
                f"the application's args: {name} is not theirs to say; write {where} in the file"
            )
    return validate_config(ServingConfig, args, where="the application's args")
