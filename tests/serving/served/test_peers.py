"""What users of other servers run into, tried on a real one; docs/serving.md has the whole list."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import io
import json
import re
import socket
import time
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from openai.types import (
    ImageEditCompletedEvent,
    ImageEditPartialImageEvent,
    ImageGenCompletedEvent,
    ImagesResponse,
    Model,
)
from PIL import Image

from benchmarks.serving_soak import replicas_bytes
from dim import tabletop
from dim.images import encode_png
from serving.serve import Server
from tests.serving.served.conftest import BATCH, PLACES

pytestmark = pytest.mark.usefixtures("ray_cluster")  # which the server runs on

GENERATE, EDIT = "/v1/images/generations", "/v1/images/edits"


EDITED = tabletop.sample_edit(np.random.default_rng([7, 0]))


def photo(width: int = 64, height: int = 64) -> tuple[str, bytes, str]:
    picture = tabletop.render(EDITED.source, 64).resize((width, height))
    return "photo.png", encode_png(picture), "image/png"


def opened(b64_json: str | None) -> Image.Image:
    assert b64_json
    image = Image.open(io.BytesIO(base64.b64decode(b64_json, validate=True)))
    image.load()
    return image


def generate(http: httpx.Client, **fields: Any) -> httpx.Response:
    return http.post(GENERATE, json={"prompt": "a red circle", "steps": 2, **fields})


def images(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["b64_json"] for item in answer.json()["data"]]


def test_every_size_that_is_asked_for_is_given(http: httpx.Client) -> None:
    for width, height in ((16, 16), (16, 48), (48, 16), (80, 64), (112, 80), (128, 48)):
        asked = {"size": f"{width}x{height}", "steps": 1}
        (made,) = images(generate(http, **asked))
        form = {"prompt": "x", "designer": "none", **asked}
        (edited,) = images(http.post(EDIT, data=form, files={"image": photo(70, 50)}))
        assert opened(made).size == opened(edited).size == (width, height)
    for wrong in ("64x63", "16x64", "4112x4112", "0x0", "64", "x", "-16x16"):
        refused = generate(http, size=wrong)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "size"), wrong


def test_a_seed_says_which_image_it_is(http: httpx.Client) -> None:
    first, again, other = (images(generate(http, seed=seed)) for seed in (5, 5, 6))
    assert first == again != other
    assert images(generate(http, seed=4, n=3))[1:] == [*first, *other]


def test_all_images_of_an_edit_are_painted_each_as_alone(http: httpx.Client) -> None:
    def edit(**fields: Any) -> list[str]:
        form = {"prompt": "remove the cup", "designer": "none", "steps": 3, **fields}
        return images(http.post(EDIT, data=form, files={"image": photo()}))

    together = edit(n=3, seed=1)
    assert together == [image for seed in (1, 2, 3) for image in edit(seed=seed)]
    assert len(set(together)) == 3


def test_every_image_of_a_stream_can_be_shown(client: openai.OpenAI) -> None:
    edits = client.images.edit(
        image=photo(90, 50), prompt=EDITED.instruction, stream=True, n=2, partial_images=2,
        extra_body={"steps": 4, "seed": 1, "designer": "none"},
    )  # fmt: skip
    made = client.images.generate(
        prompt="a", stream=True, n=2, partial_images=2, size="32x64",
        extra_body={"steps": 4, "seed": 1},
    )  # fmt: skip
    for events, size in ((list(edits), (90, 50)), (list(made), (32, 64))):
        kinds = [event.type.rpartition(".")[2] for event in events]
        assert sorted(kinds) == ["completed"] * 2 + ["partial_image"] * 4
        for event in events:
            assert opened(event.b64_json).size == size
            assert event.size == f"{size[0]}x{size[1]}"


def test_answers_are_what_the_sdk_declares(client: openai.OpenAI, http: httpx.Client) -> None:
    """The SDK itself takes what comes unchecked; its types as pydantic models do not."""
    form = {"prompt": EDITED.instruction, "designer": "oracle", "steps": 2}
    files = {"image": photo()}
    ImagesResponse.model_validate(http.post(EDIT, data=form, files=files).json(), strict=True)
    for fields in ({}, {"quality": "low", "steps": None}, {"output_format": "webp"}):
        ImagesResponse.model_validate(generate(http, **fields).json(), strict=True)
    Model.model_validate(http.get("/v1/models/dim").json(), strict=True)
    kinds = {
        "image_edit.partial_image": ImageEditPartialImageEvent,
        "image_edit.completed": ImageEditCompletedEvent,
        "image_generation.completed": ImageGenCompletedEvent,
    }
    more = {"stream": "true", "partial_images": "1"}
    told = events_of(http.post(EDIT, data={**form, **more}, files=files).text)
    told |= events_of(generate(http, stream=True).text)
    assert set(told) >= set(kinds)
    for name, kind in kinds.items():
        kind.model_validate_json(told[name], strict=True)


def events_of(text: str) -> dict[str, str]:
    """The last data of each event by its name."""
    return dict(re.findall(r"^event: (\S+)\r?\ndata: (.+?)\r?$", text, re.MULTILINE))


def test_no_pixel_outside_of_a_mask_changes(http: httpx.Client) -> None:
    """``test_masks.py`` tries a thousand without painting; these are painted."""
    rng = np.random.default_rng(0)
    for number in range(6):
        size = (int(rng.integers(20, 100)), int(rng.integers(20, 100)))
        alpha = Image.fromarray(rng.integers(0, 256, (3, 4), dtype=np.uint8)).resize(size)
        mask = Image.new("RGBA", size)
        mask.putalpha(alpha)
        files = {"image": photo(*size), "mask": ("mask.png", encode_png(mask))}
        kind = ("png", "webp")[number % 2]
        form = {"prompt": "x", "designer": "none", "steps": 1, "output_format": kind}
        (edited,) = images(http.post(EDIT, data=form, files=files))
        kept = np.asarray(alpha) >= 128
        source = np.asarray(Image.open(io.BytesIO(files["image"][1])))
        changed = (np.asarray(opened(edited)) != source).any(axis=-1)
        assert np.count_nonzero(changed[kept]) == 0
        assert changed[~kept].any()


def test_after_aborts_every_later_request_is_answered(http: httpx.Client) -> None:
    before = images(generate(http, seed=3, n=2))

    def leave(number: int) -> None:
        body = {"prompt": "a", "n": 2, "steps": 90, "stream": number % 2 == 0, "partial_images": 0}
        if body["stream"]:
            body["partial_images"] = 3
            with httpx.stream("POST", f"{http.base_url}{GENERATE}", json=body, timeout=30) as told:
                next(told.iter_lines())
        else:
            soon = httpx.Timeout(10, read=0.05)
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{http.base_url}{GENERATE}", json=body, timeout=soon)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(leave, range(6)))
    until(lambda: http.get("/healthz").json()["pending_images"] == 0)
    for _ in range(4):
        assert images(generate(http, seed=3, n=2)) == before


def test_clients_that_read_nothing_hold_up_nobody(server: Server, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    fields = {"prompt": "a", "stream": True, "partial_images": 3, "size": "128x128", "steps": 4}
    body = json.dumps(fields).encode()
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(PLACES // 2):
            deaf = stack.enter_context(socket.socket())
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            deaf.connect((host, int(port)))
            deaf.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body)
        for seed in range(3):
            assert len(images(generate(http, seed=seed, n=2))) == 2
    until(lambda: http.get("/healthz").json()["pending_images"] == 0)


def test_more_clients_than_places_are_answered_or_told_when_to_come_back(server: Server) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
            body = {"prompt": "a", "steps": 30, "n": 2}
            return await asyncio.gather(*(client.post(GENERATE, json=body) for _ in range(60)))

    answers = asyncio.run(ask())
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 429}
    assert statuses.count(200) >= PLACES // 2
    assert all(int(a.headers["retry-after"]) >= 1 for a in answers if a.status_code == 429)
    until(lambda: httpx.get(f"{server.url}/healthz").json()["pending_images"] == 0)


def test_a_batch_is_as_large_as_it_may_be_and_no_larger(http: httpx.Client) -> None:
    answer = generate(http, n=2 * BATCH, steps=20)
    assert {item["batch_size"] for item in answer.json()["data"]} == {BATCH}


def test_the_metric_says_which_batches_there_were(http: httpx.Client) -> None:
    """Of the replica that paints: those of servers before it are told of for a while."""

    def observed() -> dict[tuple[str, str], float]:
        found = re.findall(
            r"^ray_dim_painter_batch_size_bucket\{(.*)\} ([\d.e+]+)$",
            http.get("/metrics").text,
            re.MULTILINE,
        )
        tags = [dict(re.findall(r'(\w+)="([^"]*)"', text)) for text, _ in found]
        return {
            (tag["replica"], tag["le"]): float(count)
            for tag, (_, count) in zip(tags, found, strict=True)
        }

    def batches(replica: str, low: str, high: str) -> float:
        """How many were larger than ``low`` and no larger than ``high``."""
        now = observed()  # Prometheus' buckets count everything up to their bound
        return now.get((replica, high), 0) - now.get((replica, low), 0)

    before = observed()
    assert generate(http, n=BATCH, steps=20).status_code == 200

    def grown() -> list[str]:
        names = {replica for replica, _ in observed()}
        had = {name: before.get((name, "4.0"), 0) - before.get((name, "2.0"), 0) for name in names}
        return [name for name in names if batches(name, "2.0", "4.0") - had[name] >= 20]

    until(grown, seconds=40)
    (replica,) = grown()
    assert batches(replica, "4.0", "+Inf") == 0


def test_memory_stays_flat_over_odd_sizes(http: httpx.Client) -> None:
    """``python -m benchmarks.serving_soak`` goes on for longer; this is for every change."""

    def paint(first: int) -> None:
        for number in range(first, first + 25):
            form = {"prompt": "x", "designer": "none", "steps": 1, "seed": number}
            source = photo(33 + 7 * number % 160, 41 + 11 * number % 170)
            images(http.post(EDIT, data=form, files={"image": source}))

    paint(0)
    paint(25)
    before = replicas_bytes()
    paint(50)
    paint(75)
    assert set(before) == {"designer", "designers", "ingress", "painter"}
    for name, now in replicas_bytes().items():
        assert now - before[name] < 30 * 2**20, (name, before[name], now)


def until(condition: Any, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.05)
