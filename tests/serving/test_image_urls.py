"""Images answered by URL, from object stores that really hand them out."""

from __future__ import annotations

import httpx
import pytest
from PIL import Image

from dim.config import load_config
from dim.errors import ConfigError
from infra.storage import open_store
from serving.config import ServingConfig
from tests.serving.fakes import Server, opened
from tests.serving.test_streams import read


@pytest.fixture(params=["s3", "rclone_s3"])
def bucket(request: pytest.FixtureRequest) -> str:
    return request.getfixturevalue(request.param)


def generate(server: Server, **fields: object) -> httpx.Response:
    body = {"prompt": "x", "response_format": "url", **fields}
    return server.http.post("/v1/images/generations", json=body)  # type: ignore[return-value]


def fetch(url: str) -> Image.Image:
    assert url.startswith("http") and not url.startswith("data:")
    response = httpx.get(url)
    assert response.status_code == 200, response.text
    image = opened(response.content)
    assert response.headers["content-type"] == f"image/{(image.format or '').lower()}"
    return image


def test_an_image_is_read_at_its_url(bucket: str) -> None:
    server = Server(object_store=f"{bucket}/served", url_s=60)
    answer = generate(server, n=2, output_format="webp", size="32x64")
    assert answer.status_code == 200, answer.text
    items = answer.json()["data"]
    assert [item["b64_json"] for item in items] == [None, None]
    assert len({item["url"] for item in items}) == 2
    for item in items:
        image = fetch(item["url"])
        assert (image.format, image.size) == ("WEBP", (32, 64))
    assert len(open_store(f"{bucket}/served").list("images")) == 2


def test_a_stream_ends_with_the_url(s3: str) -> None:
    found = read(generate(Server(object_store=s3), stream=True, partial_images=1))
    (_, partial), (name, completed) = found
    assert partial["b64_json"] and name == "image_generation.completed"
    assert completed["b64_json"] is None
    assert fetch(completed["url"]).format == "PNG"


def test_a_store_that_refuses_is_no_fault_of_the_client(s3: str) -> None:
    response = generate(Server(object_store=f"{s3}-gone/images"))
    assert response.status_code == 503
    assert "gone" not in response.text


def test_a_local_folder_has_no_urls() -> None:
    with pytest.raises(ConfigError, match="object_store.*s3://"):
        load_config(ServingConfig, None, ["model=m", "object_store=/srv/images"])
