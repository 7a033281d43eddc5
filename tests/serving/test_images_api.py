"""What a request's fields come to, with parts that need no Ray."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import httpx
import pytest
from PIL import Image

from dim import __version__, provenance
from dim.images import encode_png
from serving.jobs import EditJob, GenerateJob
from serving.work import Work
from tests.serving.fakes import BLUEPRINT, Server, data_url, opened, picture


@pytest.fixture
def server() -> Server:
    return Server()


def edit(server: Server, image: bytes | None = None, **fields: Any) -> Any:
    files = {"image": ("a.png", image or picture())}
    return server.http.post("/v1/images/edits", data={"prompt": "x", **fields}, files=files)


def generate(server: Server, **fields: Any) -> Any:
    return server.http.post("/v1/images/generations", json={"prompt": "x", **fields})


def refusal(response: httpx.Response, param: str | None, status: int = 400) -> str:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["param"] == param
    return error["message"]


def test_a_form_and_json_are_the_same_edit(server: Server) -> None:
    form = edit(server, seed=7, n=2)
    body = {"prompt": "x", "seed": 7, "n": 2, "images": [data_url(picture())]}
    json = server.http.post("/v1/images/edits", json=body)
    assert form.status_code == json.status_code == 200
    mine, theirs = form.json(), json.json()
    mine.pop("created"), theirs.pop("created")
    assert mine == theirs
    assert [item["seed"] for item in mine["data"]] == [7, 8]
    assert mine["data"][0]["blueprint"] == mine["data"][0]["revised_prompt"] == BLUEPRINT
    assert (mine["size"], mine["output_format"], mine["background"]) == ("48x32", "png", "opaque")
    assert server.designer.jobs[0].instruction == "x"
    assert {job.text for job in server.painter.jobs if isinstance(job, EditJob)} == {BLUEPRINT}


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 5),
        ({"quality": "auto"}, 5),
        ({"quality": "low"}, 3),
        ({"quality": "medium"}, 5),
        ({"quality": "standard"}, 5),
        ({"quality": "high"}, 10),
        ({"quality": "hd"}, 10),
        ({"steps": 7}, 7),
        ({"num_inference_steps": 7}, 7),
    ],
)
def test_quality_says_how_many_steps(server: Server, fields: dict, steps: int) -> None:
    said = generate(server, **fields).json()["quality"]
    assert server.painter.jobs[-1].steps == steps
    words = {"auto": None, "standard": "medium", "hd": "high"}
    quality = fields.get("quality")
    assert said == words.get(quality, quality)


def test_high_quality_stays_within_the_servers_steps() -> None:
    server = Server(max_steps=8)
    generate(server, quality="high")
    assert server.painter.jobs[-1].steps == 8


def test_settings_reach_the_painter(server: Server) -> None:
    generate(server, guidance_scale=3.5, negative_prompt="blur", seed=4, size="32x64")
    job = server.painter.jobs[-1]
    assert isinstance(job, GenerateJob)
    assert (job.guidance_scale, job.negative_prompt, job.seed) == (3.5, "blur", 4)
    assert job.size == (32, 64) and job.deadline is not None


@pytest.mark.parametrize(
    ("size", "shown", "fit", "given"),
    [
        ("auto", (48, 32), "source", "48x32"),
        ("64x64", (48, 32), "square", "64x64"),
        ("96x32", (96, 32), "source", "96x32"),
    ],
)
def test_an_edit_has_the_size_that_is_asked_for(
    server: Server, size: str, shown: tuple[int, int], fit: str, given: str
) -> None:
    answer = edit(server, size=size).json()
    job = server.painter.jobs[-1]
    assert isinstance(job, EditJob)
    assert (opened(job.image).size, job.fit, answer["size"]) == (shown, fit, given)
    assert server.designer.jobs[-1].image == job.image
    wanted = tuple(map(int, given.split("x")))
    assert opened(answer["data"][0]["b64_json"]).size == wanted


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_every_output_format(server: Server, name: str) -> None:
    answer = generate(server, output_format=name).json()
    assert answer["output_format"] == name
    assert opened(answer["data"][0]["b64_json"]).format == name.upper()


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_an_image_says_by_whom_it_was_painted(server: Server, name: str) -> None:
    items = edit(server, output_format=name, seed=8, n=2, steps=3).json()["data"]
    assert [item["release"] for item in items] == ["edit2@cafe"] * 2
    said = [provenance.read(base64.b64decode(item["b64_json"])) for item in items]
    assert said[0] == {
        "model": "edit2",
        "release": "edit2@cafe",
        "model_hash": "cafe",
        "version": __version__,
        "seed": "8",
        "steps": "3",
        "guidance_scale": "2.0",
        "blueprint_sha256": hashlib.sha256(BLUEPRINT.encode()).hexdigest(),
    }
    assert said[1] == {**said[0], "seed": "9"}
    generated = generate(server, output_format=name).json()["data"][0]["b64_json"]
    assert "blueprint_sha256" not in (provenance.read(base64.b64decode(generated)) or {})


@pytest.mark.parametrize(
    ("fields", "behind"),
    [({}, False), ({"service_tier": "default"}, False), ({"service_tier": "flex"}, True)],
)
def test_flex_stands_behind_others(server: Server, fields: dict, behind: bool) -> None:
    assert edit(server, **fields).status_code == generate(server, **fields).status_code == 200
    assert [job.batch for job in server.painter.jobs] == [behind, behind]
    answer = generate(server, service_tier="priority")
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "service_tier"


def test_compression_reaches_the_file(server: Server) -> None:
    generate(server, output_format="jpeg", output_compression=30)
    assert server.painter.jobs[-1].output.compression == 30


def test_usage_counts_what_is_read_and_painted(server: Server) -> None:
    usage = generate(server, prompt="a red circle", negative_prompt="blur", n=2).json()["usage"]
    assert usage["input_tokens_details"] == {"text_tokens": 4, "image_tokens": 0}
    assert (usage["input_tokens"], usage["output_tokens"]) == (4, 2 * 16)
    assert usage["total_tokens"] == 36
    usage = edit(server, blueprint="one two", size="64x64").json()["usage"]
    assert usage["input_tokens_details"] == {"text_tokens": 2, "image_tokens": 16}
    assert usage["output_tokens"] == 16


@pytest.mark.parametrize("model", ["edit2", "dim", "", None])
def test_the_model_is_called_by_its_name(server: Server, model: str | None) -> None:
    assert generate(server, model=model).status_code == 200


def test_another_model_is_not_found(server: Server) -> None:
    response = generate(server, model="gpt-image-1")
    assert "'edit2' is" in refusal(response, "model", 404)
    assert response.json()["error"]["code"] == "model_not_found"


def test_fields_that_change_nothing_are_taken(server: Server) -> None:
    harmless = {"user": "me", "safety_identifier": "x", "moderation": "low", "background": "auto"}
    assert generate(server, **harmless).status_code == 200
    assert edit(server, input_fidelity="high", background="opaque").status_code == 200


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"size": "1600x512"}, "size", "at most 3 times"),
        ({"size": "72x64"}, "size", "multiples of 16"),
        ({"size": "8192x4096"}, "size", "at most 4096"),
        ({"steps": 101}, "steps", "at most 100"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"background": "transparent"}, "background", "opaque"),
        ({"image": "x"}, "image", "no field 'image'"),
        ({"rounds": 3}, "rounds", "not supported"),
    ],
)
def test_what_is_not_done_is_refused(server: Server, fields: dict, param: str, said: str) -> None:
    assert said in refusal(generate(server, **fields), param)
    assert not server.painter.jobs


def masked(size: tuple[int, int] = (48, 32), alpha: int = 255, hole: int = 0) -> bytes:
    """A mask whose left half has ``hole`` for its alpha."""
    mask = Image.new("RGBA", size, (1, 2, 3, alpha))
    mask.paste((9, 9, 9, hole), (0, 0, size[0] // 2, size[1]))
    return encode_png(mask)


def edit_masked(server: Server, mask: bytes, **fields: Any) -> Any:
    files = {"image": ("a.png", picture()), "mask": ("mask.png", mask)}
    return server.http.post("/v1/images/edits", data={"prompt": "x", **fields}, files=files)


@pytest.mark.parametrize("kind", ["form", "json"])
def test_a_mask_reaches_the_painter_the_other_way_round(server: Server, kind: str) -> None:
    if kind == "form":
        response = edit_masked(server, masked())
    else:
        body = {"prompt": "x", "images": [data_url(picture())], "mask": data_url(masked())}
        response = server.http.post("/v1/images/edits", json=body)
    assert response.status_code == 200, response.text
    job = server.painter.jobs[-1]
    assert isinstance(job, EditJob) and job.mask is not None
    mask = opened(job.mask)
    assert (mask.mode, mask.size) == ("L", (48, 32))
    assert mask.getpixel((0, 0)) == 255 and mask.getpixel((47, 0)) == 0


@pytest.mark.parametrize(
    ("mask", "fields", "param", "said"),
    [
        (masked((32, 48)), {}, "mask", "is 32x48 and the image, upright, 48x32"),
        (masked(hole=255), {}, "mask", "has no transparent pixel"),
        (picture(), {}, "mask", "no alpha channel"),
        (b"rubbish", {}, "mask", "not a picture that can be read"),
        (masked()[:-30], {}, "mask", "is damaged"),
        (masked(), {"size": "64x64"}, "size", "with a mask it is auto"),
        (masked(), {"output_format": "jpeg"}, "output_format", "lossy"),
        (
            masked(),
            {"output_format": "webp", "output_compression": 90},
            "output_format",
            "lossy",
        ),
    ],
    ids=lambda value: None if isinstance(value, bytes) else str(value)[:30],
)
def test_a_mask_that_cannot_hold_is_refused(
    server: Server, mask: bytes, fields: dict, param: str, said: str
) -> None:
    assert said in refusal(edit_masked(server, mask, **fields), param)
    assert not server.painter.jobs


def test_a_lossless_webp_keeps_what_a_mask_leaves_out(server: Server) -> None:
    assert edit_masked(server, masked(), output_format="webp").status_code == 200
    assert server.painter.jobs[-1].output.lossless


def test_a_webp_cannot_be_as_long_as_other_files(server: Server) -> None:
    long = picture(17_000, 8)
    assert "16383" in refusal(edit(server, long, output_format="webp"), "output_format")
    assert edit(server, long, output_format="jpeg").status_code == 200


def test_a_full_server_refuses_before_it_reads_a_body() -> None:
    server = Server(max_pending=10)
    with server.app.state.admission.admit(Work(images=10)):
        broken = server.http.post("/v1/images/generations", content=b"rubbish")
        assert "busy" in refusal(broken, None, 429)
    assert "application/json" in refusal(
        server.http.post("/v1/images/generations", content=b"rubbish"), None, 415
    )


def test_the_schema_names_every_field(server: Server) -> None:
    schema = server.http.get("/openapi.json").json()
    schemas = schema["components"]["schemas"]
    for body in ("EditForm", "EditRequest", "GenerationRequest", "ImagesResponse"):
        assert "prompt" in schemas[body]["properties"] or body == "ImagesResponse"
    assert "contentMediaType" in schemas["EditForm"]["properties"]["image"]  # a file
    bodies = schema["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"multipart/form-data", "application/json"}
    text = server.http.get("/openapi.json").text
    named = {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}
    assert named <= set(schemas)
    assert server.http.get("/docs").status_code == 200
