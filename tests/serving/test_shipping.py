"""A picture is shipped once a request, however many calls it goes with."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Generator
from typing import Any

import pytest
from PIL import Image

from dim.images import decode_image, encode_png
from serving import shipping
from serving.shipping import INLINE_BYTES, received
from tests.serving.fakes import Server, opened


class Ref:
    """What ``FakeRay.put`` gives: awaited, the object."""

    def __init__(self, data: bytes) -> None:
        self.data = data

    def __await__(self) -> Generator[Any, None, bytes]:
        yield from asyncio.sleep(0).__await__()
        return self.data


class FakeRay:
    """Ray's object store."""

    def __init__(self) -> None:
        self.put_there: list[bytes] = []

    def is_initialized(self) -> bool:
        return True

    def put(self, data: bytes) -> Ref:
        self.put_there.append(data)
        return Ref(data)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> FakeRay:
    fake = FakeRay()
    monkeypatch.setattr(shipping, "ray", fake)
    return fake


def noise(side: int) -> bytes:
    return encode_png(Image.frombytes("RGB", (side, side), os.urandom(3 * side * side)))


def edit(server: Server, image: bytes, **fields: object) -> dict[str, Any]:
    body = {"prompt": "remove the cup", **fields}
    answer = server.http.post("/v1/images/edits", data=body, files={"image": ("a.png", image)})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_large_source_is_shipped_once_for_designer_and_all_images(ray: FakeRay) -> None:
    server, image = Server(), noise(256)
    answer = edit(server, image, n=4)
    (shipped,) = ray.put_there
    assert len(shipped) > INLINE_BYTES
    assert len({id(job.image) for job in [*server.painter.jobs, *server.designer.jobs]}) == 1  # type: ignore[union-attr]
    assert decode_image(shipped).tobytes() == decode_image(image).tobytes()
    assert [opened(item["b64_json"]).size for item in answer["data"]] == [(256, 256)] * 4


def test_a_small_source_goes_within_the_calls(ray: FakeRay) -> None:
    server, image = Server(), noise(32)
    edit(server, image, designer="none")
    assert not ray.put_there
    (job,) = server.painter.jobs
    data = asyncio.run(received(job.image))  # type: ignore[union-attr]
    assert decode_image(data).tobytes() == decode_image(image).tobytes()
