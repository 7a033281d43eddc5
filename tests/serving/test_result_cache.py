"""Answers that are given again."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from serving.encoding import encode
from serving.jobs import Painted
from serving.protocol import GenerationRequest
from serving.result_cache import ResultCache
from tests.serving import fakes
from tests.serving.fakes import Method, Server, opened, picture

MUCH = 10_000_000


@pytest.fixture
def server() -> Server:
    return Server(result_cache_bytes=MUCH, adapters={"oil": "oil"})


def edit(server: Server, image: bytes = b"", **fields: Any) -> Any:
    data = {"prompt": "remove the cup", "seed": 7, **fields}
    data = {name: value for name, value in data.items() if value is not None}
    return server.http.post(
        "/v1/images/edits", data=data, files={"image": ("a.png", image or picture())}
    )


def test_the_same_request_is_answered_without_painting(server: Server) -> None:
    first, again = edit(server), edit(server)
    assert first.status_code == again.status_code == 200
    assert [answer.headers["x-cache"] for answer in (first, again)] == ["MISS", "HIT"]
    assert first.json() == again.json()
    assert len(server.painter.jobs) == len(server.designer.jobs) == 1
    assert server.app.state.admission.pending.images == 0


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 8}, {"prompt": "remove it"}, {"steps": 4}, {"n": 2}, {"adapter": "oil"},
        {"image": picture(colour="blue")}, {"output_format": "webp"}, {"designer": "none"},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_another_request_is_painted(server: Server, change: dict[str, Any]) -> None:
    edit(server)
    assert edit(server, **change).headers["x-cache"] == "MISS"


def test_another_model_paints_anew(server: Server) -> None:
    edit(server)
    moved = dataclasses.replace(fakes.DEFAULTS, model_hash="beef", release="edit2@beef")

    async def defaults() -> Any:
        return moved

    server.painter.defaults = Method(defaults)
    server.renew()
    assert edit(server).headers["x-cache"] == "MISS"


def test_what_another_model_painted_meanwhile_is_not_kept(server: Server) -> None:
    real = fakes.RELEASE

    async def moved(job: Any) -> Any:
        data = encode(opened(picture()), job.output)
        yield Painted(data, 1, 1, "edit2@beef")

    painter = server.painter.paint
    server.painter.paint = Method(moved)
    assert edit(server).headers["x-cache"] == "MISS"
    server.painter.paint = painter
    again = edit(server)
    assert again.headers["x-cache"] == "MISS"
    assert again.json()["data"][0]["release"] == real.name


def test_what_has_no_seed_or_is_no_whole_answer_is_not_kept(server: Server) -> None:
    for fields in ({"seed": None}, {"stream": "true"}):
        for _ in range(2):
            assert "x-cache" not in edit(server, **fields).headers
    assert len(server.painter.jobs) == 4
    failing = Server(result_cache_bytes=MUCH)
    failing.painter.error = ValueError("broken")
    assert [edit(failing).status_code for _ in range(2)] == [500, 500]
    off = Server()
    assert "x-cache" not in edit(off).headers and "x-cache" not in edit(off).headers
    assert len(off.painter.jobs) == 2


def test_memory_is_bounded_and_the_longest_unasked_goes_first() -> None:
    cache = ResultCache(100)
    keys = [cache.key(GenerationRequest(prompt="a", seed=seed), "cafe") for seed in range(4)]
    for key in keys[:3]:
        cache.put(key, b"x" * 30)
    assert cache.get(keys[0])
    cache.put(keys[3], b"x" * 40)
    assert [cache.get(key) is not None for key in keys] == [True, False, True, True]
    cache.put(keys[1], b"x" * 101)
    assert cache.get(keys[1]) is None and cache.get(keys[3])
    cache.put(keys[3], b"y" * 35)
    cache.put(keys[1], b"z" * 5)
    assert [cache.get(key) is not None for key in keys] == [True, True, True, True]
