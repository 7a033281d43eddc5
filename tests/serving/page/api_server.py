"""The server's contract without its models: the page, and routes that answer at once and alike.

An edit inverts the source where the mask lets it; a blueprint says what was asked. What a test
wants to go wrong is set on ``Api``, and what came in is kept there.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from PIL import Image, ImageOps

from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from infra.ports import free_port
from serving import page
from serving.errors import answer

SECTIONS = ("instruction", "global_layout", "local_objects", "edit_area", "imagination")


@dataclass
class Call:
    """One request that came in."""

    path: str
    fields: dict[str, Any]
    files: dict[str, bytes]
    headers: dict[str, str]


@dataclass
class Api:
    """What the server does, and what it was asked. ``reset`` brings it back to doing all well."""

    url: str = ""
    designers: tuple[str, ...] = ("fast", "best", "none")
    contributions: str = "never"
    """As ``/v1/models`` says it; of an edit with consent a name is told."""
    key: str | None = None
    """The API key that is asked for."""
    failures: list[Response] = field(default_factory=list)
    """Answers to the next requests of images and blueprints, instead of doing them."""
    breaks: str | None = None
    """``cut``: streams end before their last event; ``error``: with an event ``error``."""
    hold: threading.Event = field(default_factory=threading.Event)
    """Streams go on past their first event only while this is set."""
    calls: list[Call] = field(default_factory=list)
    gone: threading.Event = field(default_factory=threading.Event)
    """Set when a client left in the middle of a stream."""

    def reset(self) -> None:
        self.designers, self.key, self.breaks = ("fast", "best", "none"), None, None
        self.contributions = "never"
        self.failures.clear()
        self.calls.clear()
        self.gone.clear()
        self.hold.set()

    def last(self, path: str) -> Call:
        return [call for call in self.calls if call.path == path][-1]


def blueprint_of(prompt: str) -> Blueprint:
    """What every designer here writes."""
    return Blueprint(
        instruction=prompt,
        global_layout="A table with a red circle on the left and a blue square on the right.",
        local_objects="The circle is red, flat and small; the square is blue and larger.",
        edit_area="Only what the instruction names changes; all the rest stays as it is.",
        imagination="The same table in the same light, with the one thing changed.",
    )


def inverted(source: Image.Image, mask: Image.Image | None, strength: float = 1.0) -> Image.Image:
    """The edit: ``source`` towards its negative, where ``mask`` is transparent or there is none."""
    edited = Image.blend(source, ImageOps.invert(source), strength)
    if mask is not None:
        edited.paste(source, mask=mask.getchannel("A"))
    return edited


def png(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def make_app(api: Api) -> FastAPI:
    """The routes that the page asks."""
    app = FastAPI()
    app.router.routes.extend(page.routes)

    async def take(request: Request) -> Call | Response:
        call = await read(request)
        api.calls.append(call)
        if api.key is not None and request.headers.get("authorization") != f"Bearer {api.key}":
            return answer(401, "an API key is needed", "invalid_request_error")
        return api.failures.pop(0) if api.failures else call

    async def events(*pieces: tuple[str, dict[str, Any]]) -> AsyncIterator[str]:
        try:
            for number, (name, data) in enumerate(pieces):
                if api.breaks and number == len(pieces) - 1:
                    if api.breaks == "error":
                        yield event("error", {"error": {"message": "the painter fell over"}})
                    return
                yield event(name, data)
                while not api.hold.is_set():  # noqa: ASYNC110, it is set by another thread
                    await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            api.gone.set()
            raise

    def stream(*pieces: tuple[str, dict[str, Any]]) -> Response:
        return StreamingResponse(events(*pieces), media_type="text/event-stream")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        if api.key is not None and request.headers.get("authorization") != f"Bearer {api.key}":
            return answer(401, "an API key is needed", "invalid_request_error")
        model = {"id": "tiny-edit2", "object": "model", "contributions": api.contributions}
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/healthz")
    async def healthz() -> Response:
        return JSONResponse({"status": "ready", "designers": api.designers})

    @app.post("/v1/blueprints/check")
    async def check(request: Request) -> Response:
        api.calls.append(call := await read(request))
        return JSONResponse(checked(call.fields["blueprint"]))

    @app.post("/v1/blueprints")
    async def blueprints(request: Request) -> Response:
        if isinstance(call := await take(request), Response):
            return call
        text = blueprint_of(call.fields["prompt"]).render()
        # Who writes is not said by a page that has not learned yet who there is.
        designer = call.fields.get("designer", api.designers[0])
        done = {"object": "blueprint", "blueprint": text, "designer": designer}
        return stream(*deltas("blueprint", text), ("blueprint.done", done))

    @app.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        if isinstance(call := await take(request), Response):
            return call
        text = call.fields.get("blueprint")
        written = []
        if text is None and call.fields.get("designer") != "none":
            text = blueprint_of(call.fields["prompt"]).render()
            written = deltas("image_edit.blueprint", text)
            written.append(("image_edit.blueprint.done", {"blueprint": text}))
        source = Image.open(io.BytesIO(call.files["image"])).convert("RGB")
        mask = Image.open(io.BytesIO(call.files["mask"])) if "mask" in call.files else None
        consent = call.fields.get("consent", str(api.contributions == "always").lower())
        more = {"contribution": "name/1" if consent == "true" else None}
        if {"rounds", "best_of"} & call.fields.keys():
            return stream(*written, *looked_at(source, text, call, **more))
        return stream(
            *written,
            *partials("image_edit", [inverted(source, mask, part) for part in (0.3, 0.6)]),
            *completed("image_edit", inverted(source, mask), call, blueprint=text, **more),
        )

    @app.post("/v1/contributions/{id:path}/accept")
    @app.delete("/v1/contributions/{id:path}")
    async def contributions(request: Request, id: str) -> Response:
        path = f"{request.method} {request.scope['raw_path'].decode()}"
        api.calls.append(Call(path, {}, {}, dict(request.headers)))
        return api.failures.pop(0) if api.failures else JSONResponse({"id": id})

    @app.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        if isinstance(call := await take(request), Response):
            return call
        picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
        return stream(
            *partials("image_generation", [inverted(picture, None, 0.5)]),
            *completed("image_generation", picture, call),
        )

    return app


async def read(request: Request) -> Call:
    """A request's fields and files, of a form or of JSON."""
    path, headers = request.url.path, dict(request.headers)
    if request.headers["content-type"] == "application/json":
        return Call(path, await request.json(), {}, headers)
    async with request.form() as form:
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        files = {
            name: await value.read() for name, value in form.items() if not isinstance(value, str)
        }
    return Call(path, fields, files, headers)


def event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n"


def deltas(name: str, text: str) -> list[tuple[str, dict[str, Any]]]:
    return [(f"{name}.delta", {"delta": text[at : at + 7]}) for at in range(0, len(text), 7)]


def partials(name: str, images: list[Image.Image]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (
            f"{name}.partial_image",
            {"b64_json": encoded(image), "partial_image_index": number, "output_format": "png"},
        )
        for number, image in enumerate(images)
    ]


def looked_at(
    source: Image.Image, text: str, call: Call, **more: Any
) -> list[tuple[str, dict[str, Any]]]:
    """Two rounds, of which the second is accepted; the best of it is its first image."""
    best_of, first = int(call.fields.get("best_of", 1)), int(call.fields.get("seed", 100))
    told, painted = [], []
    for number in range(2 * best_of):
        round_, best = 1 + number // best_of, number == best_of
        plan = text.replace("in the same light", "in the evening") if round_ == 2 else text
        review = {
            "round": round_, "seed": first + number, "blueprint": plan,
            "score": 9.04 if best else 3 + number, "accepted": best, "error": None, "seconds": 0.1,
            "missing": "" if best else f"the circle is still red, <b>{number}</b>",
        }  # fmt: skip
        painted.append((inverted(source, None, 0.2 * (1 + number)), review))
    for image, review in painted:
        data = {"review": review, "b64_json": encoded(image), "output_format": "png"}
        told.append(("image_edit.review", data))
    image, review = painted[best_of]
    data = {"b64_json": encoded(image), "output_format": "png", "image_index": 0, **more}
    data |= {"seed": review["seed"], "blueprint": review["blueprint"]}
    return [*told, ("image_edit.completed", data)]


def completed(
    name: str, image: Image.Image, call: Call, **more: Any
) -> list[tuple[str, dict[str, Any]]]:
    """The finished images, the last one first: they come as they are done."""
    seed = int(call.fields.get("seed", 100))
    shared = {"b64_json": encoded(image), "output_format": "png", **more}
    return [
        (f"{name}.completed", {**shared, "image_index": number, "seed": seed + number})
        for number in reversed(range(int(call.fields.get("n", 1))))
    ]


def encoded(image: Image.Image) -> str:
    return base64.b64encode(png(image)).decode("ascii")


def checked(text: str) -> dict[str, Any]:
    """The answer of ``/v1/blueprints/check``."""
    try:
        read = Blueprint.parse(text)
    except BlueprintError as error:
        said = str(error)
        number = next((int(word) for word in said.split() if word.isdigit()), None)
        section = SECTIONS[number - 1] if number else None
        return {"valid": False, "section": section, "message": said, "blueprint": None}
    return {"valid": True, "section": None, "message": "", "blueprint": read.render()}


@contextmanager
def running() -> Iterator[Api]:
    """Serve until the block ends."""
    api = Api()
    api.reset()
    port = free_port()
    config = uvicorn.Config(make_app(api), port=port, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        if time.monotonic() > deadline:
            raise TimeoutError("the test's server did not start")
        time.sleep(0.02)
    api.url = f"http://127.0.0.1:{port}"
    yield api
    api.hold.set()
    server.should_exit = True
    thread.join(timeout=20)
