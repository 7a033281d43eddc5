"""Bodies that nobody means well with: every one gets a sentence, and none is the server's fault."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

import httpx
import pytest

from serving.protocol import REFUSED
from tests.serving.fakes import Server, data_url, picture

ROUTES = (
    "/v1/images/edits",
    "/v1/images/generations",
    "/v1/blueprints",
    "/v1/blueprints/check",
)
KINDS = (
    "", "text/plain", "application/json; charset=utf-16", "application/json; charset=none",
    "multipart/form-data", "multipart/form-data; boundary=", "multipart/form-data; boundary=x",
    "multipart/form-data; boundary=" + "b" * 300, "multipart/mixed; boundary=b", "\x00", "*/*",
)  # fmt: skip
"""What a body may say it is, beside the two kinds that there are."""
BODIES = 10_000
VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1.5, 1e400, float("nan"), 10**400, "", " ", "null", "0", "1e9", "auto",
    "64x64", "99999x1", "0x0", "\0", "\ud800", "é" * 40_000, "none", "../..", [], [[]], {},
    {"image_url": 3}, [data_url(b"x")], [data_url(picture(9, 9))], [{"image_url": "data:,"}],
    [{"image_url": "http://a"}], data_url(picture(9, 9)), "data:image/png;base64,AAAA",
    "${jndi:ldap://a}", {"a": {"b": [None]}},
)  # fmt: skip
FIELDS = (
    "prompt", "images", "image", "mask", "n", "size", "quality", "output_format",
    "output_compression", "background", "response_format", "stream", "partial_images", "seed",
    "steps", "num_inference_steps", "guidance_scale", "negative_prompt", "designer", "blueprint",
    "model", "user", "moderation", "input_fidelity", "image[]", "x" * 9000, *REFUSED,
)  # fmt: skip


def some_fields(chance: random.Random) -> dict[str, Any]:
    names = chance.sample(FIELDS, chance.randint(0, 5))
    fields: dict[str, Any] = {"prompt": "x", "images": [data_url(picture(9, 9))]}
    for name in chance.sample(sorted(fields), chance.randint(0, 1)):
        del fields[name]
    return fields | {name: chance.choice(VALUES) for name in names}


def some_json(chance: random.Random) -> bytes:
    text = damaged(json.dumps(some_fields(chance)).encode(), chance)
    return chance.choice([text, text, text, text[: chance.randrange(len(text))], b"[" * 50_000])


def damaged(body: bytes, chance: random.Random) -> bytes:
    """A fifth of them with a few bytes in the place of one."""
    if chance.random() >= 0.2:
        return body
    place = chance.randrange(len(body))
    return body[:place] + chance.randbytes(chance.randint(0, 3)) + body[place + 1 :]


def some_form(chance: random.Random) -> bytes:
    parts = [("image", picture(9, 9)), ("prompt", b"x")]
    parts += [(k, str(v).encode(errors="replace")) for k, v in some_fields(chance).items()]
    chance.shuffle(parts)
    lines = b""
    for name, value in parts[: chance.randint(1, len(parts))]:
        file = '; filename="a.png"' if name == chance.choice(["image", name]) else ""
        head = f'Content-Disposition: form-data; name="{name}"{file}'
        lines += b"--b\r\n" + head.encode() + b"\r\n\r\n" + value + b"\r\n"
    lines = damaged(lines + b"--b--\r\n", chance)
    return chance.choice([lines, lines, lines[: chance.randrange(len(lines))]])


@pytest.mark.parametrize("seed", range(4))
def test_no_body_is_the_servers_fault(seed: int) -> None:
    server = Server()
    seen = asyncio.run(send_bodies(server, random.Random(seed), BODIES // 4))
    assert {200, 400} <= seen
    assert server.app.state.admission.pending.images == 0


async def send_bodies(server: Server, chance: random.Random, count: int) -> set[int]:
    """The statuses of so many bodies, the last of them one that is meant well."""
    seen = set()
    transport = httpx.ASGITransport(server.app)  # what the application raises is raised here
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for number in range(count):
            form = chance.random() < 0.4
            body = some_form(chance) if form else some_json(chance)
            kind = "multipart/form-data; boundary=b" if form else "application/json"
            if chance.random() < 0.1:
                kind = chance.choice(KINDS)
            answer = await client.post(
                chance.choice(ROUTES), content=body, headers={"content-type": kind}
            )
            assert answer.status_code < 500, (number, body[:2000], answer.text[:500])
            if answer.status_code >= 400:
                error = answer.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                assert 0 < len(error["message"]) < 500 and "\n" not in error["message"], error
                assert "Traceback" not in answer.text
            seen.add(answer.status_code)
        body = {"prompt": "x", "images": [data_url(picture())]}
        assert (await client.post(ROUTES[0], json=body)).status_code == 200
    return seen
