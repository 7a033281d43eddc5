"""A real server on a real Ray, asked by OpenAI's own client as users ask it."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from dim import model as models
from dim import tabletop
from dim.blueprint import Blueprint
from dim.images import encode_png
from dim.model import DIM
from serving.serve import Server
from tests.serving.served.conftest import BODY_LIMIT

pytestmark = pytest.mark.usefixtures("ray_cluster")  # which the server runs on

STEPS = 3
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def model(tiny_model_dir: Path) -> DIM:
    return models.load(tiny_model_dir)


def sample(number: int) -> tabletop.Edit:
    return tabletop.sample_edit(np.random.default_rng([7, number]))


def picture(number: int) -> Image.Image:
    return tabletop.render(sample(number).source, 64)


def decoded(item: Any) -> Image.Image:
    assert item.b64_json is not None
    return Image.open(io.BytesIO(base64.b64decode(item.b64_json)))


def difference(one: Image.Image, other: Image.Image) -> int:
    """Largest difference of a sample, of 255."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def ask_edit(client: openai.OpenAI, number: int, **extra: object) -> openai.types.ImagesResponse:
    return client.images.edit(
        image=("photo.png", encode_png(picture(number)), "image/png"),
        prompt=sample(number).instruction,
        extra_body={"steps": STEPS, **extra},
    )


def post_edit(http: httpx.Client, image: bytes | None, **fields: object) -> httpx.Response:
    fields = {"prompt": "remove the cup", "designer": "none", "steps": STEPS, **fields}
    return http.post(
        "/v1/images/edits",
        data={name: value for name, value in fields.items() if value is not None},
        files={"image": ("photo", image)} if image is not None else {"other": ("x", b"x")},
    )


def error_of(response: httpx.Response) -> dict[str, str]:
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return body["error"]


def test_health_reports_model_and_readiness(http: httpx.Client) -> None:
    response = http.get("/healthz")
    assert response.status_code == 200
    body = response.json()
    assert body["status"] == "ready"
    assert body["model"]
    assert body["designers"] == ["oracle", "self", "none"]
    parts = ("ingress", "designer", "designers", "painter")
    assert body["running_replicas"] == dict.fromkeys(parts, 1)
    assert (body["pending_images"], body["max_pending_images"]) == (0, 10)


def test_an_edit_is_designed_then_painted_from_its_blueprint(
    client: openai.OpenAI, model: DIM
) -> None:
    response = ask_edit(client, 0, seed=5)
    item = response.data[0]
    blueprint = Blueprint.parse(item.revised_prompt)
    assert blueprint.instruction == sample(0).instruction
    assert item.blueprint == item.revised_prompt == blueprint.render()
    expected = model.edit(
        [picture(0)], [sample(0).instruction], blueprints=[item.blueprint], seeds=[5], steps=STEPS
    )[0]
    assert difference(decoded(item), expected.image) <= 1


def test_without_designer_the_prompt_itself_is_painted(client: openai.OpenAI, model: DIM) -> None:
    item = ask_edit(client, 1, seed=5, designer="none").data[0]
    assert item.blueprint is None
    expected = model.edit([picture(1)], [sample(1).instruction], seeds=[5], steps=STEPS)[0]
    assert difference(decoded(item), expected.image) <= 1


def test_a_blueprint_of_the_client_is_used_as_it_is(client: openai.OpenAI, model: DIM) -> None:
    text = "  1. Whatever: the client knows best.\n"
    item = ask_edit(client, 1, seed=5, blueprint=text).data[0]
    assert item.blueprint == text
    expected = model.edit(
        [picture(1)], [sample(1).instruction], blueprints=[text], seeds=[5], steps=STEPS
    )[0]
    assert difference(decoded(item), expected.image) <= 1


def test_a_designer_that_answers_rubbish_is_a_502_with_its_reason(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        ask_edit(client, 0, designer="self")
    assert caught.value.status_code == 502
    assert "self" in caught.value.message and "blueprint" in caught.value.message
    response = post_edit(http, encode_png(picture(0)), designer="self")
    assert error_of(response)["code"] == "designer_failed"
    assert response.headers["x-should-retry"] == "false"


def test_an_image_the_oracle_cannot_read_is_its_502(http: httpx.Client) -> None:
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    response = post_edit(http, encode_png(noise), designer="oracle")
    assert response.status_code == 502
    assert "Traceback" not in error_of(response)["message"]


def test_an_edit_has_the_sources_size_or_the_models_square(http: httpx.Client) -> None:
    wide = encode_png(picture(0).resize((96, 64)))
    for fields, size in (
        ({}, (96, 64)),
        ({"size": "auto"}, (96, 64)),
        ({"size": "64x64"}, (64, 64)),
    ):
        response = post_edit(http, wide, steps=1, **fields)
        assert response.status_code == 200, response.text
        png = base64.b64decode(response.json()["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(png)).size == size


def test_what_a_mask_leaves_out_stays_as_it_is(client: openai.OpenAI) -> None:
    source = picture(1).resize((96, 80))
    mask = Image.new("RGBA", source.size, (0, 0, 0, 255))
    mask.paste((0, 0, 0, 0), (20, 10, 60, 50))
    response = client.images.edit(
        image=("photo.png", encode_png(source), "image/png"),
        mask=("mask.png", encode_png(mask), "image/png"),
        prompt="remove the cup",
        extra_body={"steps": 1, "seed": 1, "designer": "none"},
    )
    changed = np.any(np.asarray(decoded(response.data[0])) != np.asarray(source), axis=2)
    editable = np.asarray(mask.getchannel("A")) == 0
    assert not changed[~editable].any()
    assert changed[editable].any()


def test_fields_of_openais_sdk_reach_the_image(client: openai.OpenAI) -> None:
    response = client.images.generate(
        model="dim", prompt="a circle", quality="low", output_format="webp", size="32x64",
        output_compression=80, background="opaque", moderation="low", user="me",
    )  # fmt: skip
    image = decoded(response.data[0])
    assert (image.format, image.size) == ("WEBP", (32, 64))
    assert (response.output_format, response.size, response.quality) == ("webp", "32x64", "low")
    assert response.usage is not None
    assert response.usage.input_tokens_details.text_tokens == response.usage.input_tokens > 0
    assert response.usage.output_tokens == 2 * 4
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.images.generate(model="gpt-image-1", prompt="a circle")


def test_a_stream_ends_with_the_image_that_is_answered_whole(client: openai.OpenAI) -> None:
    picked = {"image": ("photo.png", encode_png(picture(0)), "image/png")}
    extra = {"steps": STEPS, "seed": 5}
    whole = client.images.edit(prompt=sample(0).instruction, extra_body=extra, **picked)
    events = list(
        client.images.edit(
            prompt=sample(0).instruction, stream=True, partial_images=1, extra_body=extra, **picked
        )
    )
    names = [event.type for event in events]
    assert names[0] == "image_edit.blueprint.delta" and names[-1] == "image_edit.completed"
    done = events[names.index("image_edit.blueprint.done")]
    assert done.blueprint == events[-1].blueprint == whole.data[0].blueprint
    assert events[-1].usage.total_tokens == whole.usage.total_tokens
    assert difference(decoded(events[-1]), decoded(whole.data[0])) <= 1


def test_a_stream_that_cannot_begin_is_an_error_like_any_other(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="size"):
        client.images.generate(prompt="a", size="9x9", stream=True)
    with pytest.raises(openai.APIStatusError) as caught:
        list(ask_edit(client, 0, designer="self", stream="true"))
    assert caught.value.status_code == 502


def test_asynchronous_clients_are_served(server: Server) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            extra = {"steps": 1, "seed": 1}
            whole = await client.images.generate(prompt="a circle", n=2, extra_body=extra)
            events = await client.images.generate(
                prompt="a circle", n=2, stream=True, extra_body=extra
            )
            streamed = {event.seed: event.b64_json async for event in events}
            assert streamed == {item.seed: item.b64_json for item in whole.data}
            return list(streamed)

    assert sorted(asyncio.run(ask())) == [1, 2]


def test_models_and_blueprints_of_the_sdk(client: openai.OpenAI, http: httpx.Client) -> None:
    (model,) = client.models.list()
    assert client.models.retrieve("dim").id == model.id == http.get("/healthz").json()["model"]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-image-1")
    data = {"prompt": sample(0).instruction, "designer": "oracle"}
    files = {"image": ("a.png", encode_png(picture(0)))}
    answer = http.post("/v1/blueprints", data=data, files=files).json()
    assert Blueprint(**answer["sections"]).render() == answer["blueprint"]


def test_the_server_is_ready_once_it_has_painted(http: httpx.Client) -> None:
    wait_for(lambda: http.get("/readyz").status_code == 200)
    assert http.get("/livez").json()["status"] == "alive"


def test_an_edit_in_json_is_the_edit_of_a_form(http: httpx.Client) -> None:
    data = encode_png(picture(0))
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    fields = {"prompt": "remove the cup", "designer": "none", "steps": 1, "seed": 3}
    body = http.post("/v1/images/edits", json={**fields, "images": [{"image_url": url}]})
    form = post_edit(http, data, **fields)
    assert form.status_code == body.status_code == 200
    mine, theirs = form.json(), body.json()
    assert mine["data"] == theirs["data"] and mine["usage"] == theirs["usage"]
    assert mine["usage"]["input_tokens_details"]["image_tokens"] > 0


def test_generations_come_in_the_size_asked_for(client: openai.OpenAI, model: DIM) -> None:
    response = client.images.generate(
        prompt="a red circle", n=2, size="64x32", extra_body={"steps": STEPS, "seed": 11}
    )
    assert [item.seed for item in response.data] == [11, 12]
    expected = model.generate(["a red circle"] * 2, size=(64, 32), seeds=[11, 12], steps=STEPS)
    for item, image in zip(response.data, expected, strict=True):
        assert decoded(item).size == (64, 32)
        assert difference(decoded(item), image) <= 1


def test_what_a_client_says_in_full_is_no_other_request(client: openai.OpenAI) -> None:
    said = {"stream": False, "response_format": "b64_json", "size": "auto", "n": 1}
    edited = client.images.edit(
        image=("photo.png", encode_png(picture(0)), "image/png"),
        prompt=sample(0).instruction,
        extra_body={"steps": 1, "seed": 3, "designer": "none", "guidance_scale": ""},
        **said,
    )
    painted = client.images.generate(
        prompt="a circle", extra_body={"steps": 1, "seed": 3, "guidance_scale": None}, **said
    )
    assert [answer.data[0].seed for answer in (edited, painted)] == [3, 3]


def test_the_default_size_is_the_models(client: openai.OpenAI) -> None:
    response = client.images.generate(prompt="a red circle", extra_body={"steps": 1})
    assert decoded(response.data[0]).size == (64, 64)


def test_without_a_seed_every_image_is_another_and_says_its_seed(client: openai.OpenAI) -> None:
    first, second = (ask_edit(client, 0, designer="none").data[0] for _ in range(2))
    assert first.seed != second.seed
    again = ask_edit(client, 0, designer="none", seed=first.seed).data[0]
    assert difference(decoded(first), decoded(again)) <= 1
    assert difference(decoded(first), decoded(second)) > 1


@pytest.mark.parametrize("kind", ["edit", "generate"])
def test_batched_is_the_same_as_alone(client: openai.OpenAI, kind: str) -> None:
    def edit(number: int) -> openai.types.Image:
        return ask_edit(client, number, seed=number, guidance_scale=1.5 + number).data[0]

    def generate(number: int) -> openai.types.Image:
        prompt = "a red circle " * (number + 1)
        extra = {"steps": STEPS, "seed": number}
        return client.images.generate(prompt=prompt, extra_body=extra).data[0]

    work = edit if kind == "edit" else generate
    alone = [work(number) for number in range(6)]
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        batched = list(pool.map(work, range(6)))
    assert {item.batch_size for item in alone} == {1}
    assert max(item.batch_size for item in batched) > 1
    for one, other in zip(alone, batched, strict=True):
        assert difference(decoded(one), decoded(other)) <= 1


def test_images_of_one_request_share_a_batch(client: openai.OpenAI) -> None:
    response = client.images.generate(prompt="a table", n=4, extra_body={"steps": 60})
    assert {item.batch_size for item in response.data} == {4}


def test_a_bad_image_in_a_batch_takes_only_itself_down(client: openai.OpenAI) -> None:
    def work(number: int) -> object:
        try:
            return ask_edit(client, number, designer="self" if number == 2 else "oracle").data[0]
        except openai.APIStatusError as error:
            return error.status_code

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(4)))
    assert results[2] == 502
    assert all(isinstance(results[number], openai.types.Image) for number in (0, 1, 3))


def as_jpeg(image: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95, **options)
    return buffer.getvalue()


def rotated_by_exif() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return as_jpeg(picture(0).transpose(Image.Transpose.ROTATE_90), exif=exif)


@pytest.mark.parametrize(
    "make",
    [
        lambda: encode_png(picture(0).convert("RGBA")),
        lambda: encode_png(picture(0).convert("P")),
        lambda: encode_png(picture(0).convert("L")),
        lambda: encode_png(Image.fromarray(np.full((70, 50), 40_000, dtype=np.uint16))),
        lambda: as_jpeg(picture(0).convert("CMYK")),
        rotated_by_exif,
        lambda: encode_png(picture(0).resize((301, 77))),
    ],
    ids=["alpha", "palette", "grey", "16-bit", "cmyk", "exif", "odd-size"],
)
def test_any_image_mode_is_edited(http: httpx.Client, make: Callable[[], bytes]) -> None:
    response = post_edit(http, make(), steps=1)
    assert response.status_code == 200, response.text


def huge_png() -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "fields", "status", "param", "said"),
    [
        (None, {}, 400, "image", "exactly one image"),
        (b"", {}, 400, "image", "empty"),
        (b"not an image", {}, 400, "image", "not an image that can be read"),
        (huge_png, {}, 400, "image", "pixels"),
        (Image.new("RGB", (4, 400)), {}, 400, "image", "8 px"),
        (0, {"prompt": None}, 400, "prompt", "field required"),
        (0, {"prompt": "   "}, 400, "prompt", "blank"),
        (0, {"prompt": "x" * 40_000}, 400, "prompt", "at most"),
        (0, {"designer": "openai:m@http://10.0.0.1/v1"}, 400, "designer", "not offered"),
        (0, {"n": 11}, 400, "n", "less than or equal to 10"),
        (0, {"n": "two"}, 400, "n", "integer"),
        (0, {"seed": -1}, 400, "seed", "greater than or equal"),
        (0, {"steps": 1000}, 400, "steps", "at most 100"),
        (0, {"guidance_scale": "nan"}, 400, "guidance_scale", "finite"),
        (0, {"size": "500x512"}, 400, "size", "multiples of 16"),
        (0, {"size": "512x128"}, 400, "size", "at most 3 times"),
        (0, {"response_format": "url"}, 400, "response_format", "b64_json"),
        (0, {"partial_images": "1"}, 400, "partial_images", "only a stream"),
        (0, {"mask": "x"}, 400, "mask", "must be a file part"),
        (0, {"model": "gpt-image-1"}, 404, "model", "not served here"),
    ],
    ids=lambda value: getattr(value, "__name__", str(value))[:30],
)
def test_a_bad_edit_is_refused_with_a_sentence(
    http: httpx.Client, image: object, fields: dict, status: int, param: str, said: str
) -> None:
    if image == 0:
        image = picture(0)
    data = image() if callable(image) else image
    data = encode_png(data) if isinstance(data, Image.Image) else data
    response = post_edit(http, data, **fields)
    assert response.status_code == status, response.text
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "not valid JSON"),
        (b"[1]", "JSON object"),
        (b"{}", "prompt: field required"),
        (b'{"prompt": "a", "size": "big"}', "WIDTHxHEIGHT"),
        (b'{"prompt": "a", "size": "65x64"}', "multiples of 16"),
        (b'{"prompt": "a", "size": "9600x64"}', "at most 4096"),
        (b'{"prompt": 3}', "prompt: "),
    ],
)
def test_a_bad_generation_is_refused_with_a_sentence(
    http: httpx.Client, body: bytes, said: str
) -> None:
    response = http.post("/v1/images/generations", content=body, headers=JSON)
    assert response.status_code == 400
    assert said in error_of(response)["message"]


def test_unknown_paths_and_methods_have_the_same_shape(http: httpx.Client) -> None:
    missing, wrong = http.get("/v1/nothing"), http.get("/v1/images/edits")
    assert (missing.status_code, wrong.status_code) == (404, 405)
    assert error_of(missing)["message"] and error_of(wrong)["message"]
    form = http.post("/v1/images/edits", json={"prompt": "x"})
    assert form.status_code == 400 and error_of(form)["param"] == "images"
    unsaid = http.post("/v1/images/edits", content=b"{}")
    assert unsaid.status_code == 415 and "multipart" in error_of(unsaid)["message"]
    broken = http.post(
        "/v1/images/edits",
        content=b"--x\r\nrubbish",
        headers={"content-type": "multipart/form-data; boundary=x"},
    )
    assert broken.status_code == 400 and error_of(broken)["message"]


def test_a_request_over_the_size_limit_is_refused_said_or_unsaid(http: httpx.Client) -> None:
    declared = post_edit(http, b"x" * (BODY_LIMIT + 1))
    assert declared.status_code == 413
    assert f"{BODY_LIMIT:,}" in error_of(declared)["message"]

    def chunks() -> Iterator[bytes]:
        for _ in range(BODY_LIMIT // 10_000 + 2):
            yield b" " * 10_000

    undeclared = http.post("/v1/images/generations", content=chunks(), headers=JSON)
    assert undeclared.status_code == 413


def test_a_full_server_says_429_and_when_to_come_back(
    client: openai.OpenAI, http: httpx.Client
) -> None:
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        full = pool.submit(
            lambda: client.images.generate(prompt="a", n=10, extra_body={"steps": 40})
        )
        wait_for(lambda: full.done() or pending(http) == 10)
        assert not full.done(), full.result()
        refused = post_edit(http, encode_png(picture(0)))
        health = http.get("/healthz")
        painted = full.result()
    assert refused.status_code == 429
    assert error_of(refused)["type"] == "rate_limit_error"
    assert int(refused.headers["retry-after"]) >= 1
    assert health.status_code == 200
    assert len(painted.data) == 10
    assert pending(http) == 0


def test_aborted_requests_leave_nothing_behind(http: httpx.Client, client: openai.OpenAI) -> None:
    def abort(number: int) -> None:
        body = {"prompt": "a", "n": 2, "steps": 60}
        soon = httpx.Timeout(10, read=0.1)  # well before a quiet machine has painted
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{http.base_url}/v1/images/generations", json=body, timeout=soon)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(abort, range(4)))
    wait_for(lambda: pending(http) == 0)
    assert len(ask_edit(client, 0, designer="none").data) == 1


def pending(http: httpx.Client) -> int:
    return http.get("/healthz").json()["pending_images"]


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
