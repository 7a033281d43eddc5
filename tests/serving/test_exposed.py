"""A server that others reach: it asks for keys, counts what they ask for, drops who is slow."""

from __future__ import annotations

import base64
import contextlib
import io
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
from PIL import Image

from dim.errors import DimError
from dim.images import encode_png
from infra.ports import free_port
from serving.config import ServingConfig
from serving.keys import fingerprint, make_key
from serving.serve import Server, start

SHOP, NIGHTLY = make_key(), make_key()
PLACES = 6
PAINT = "/v1/images/generations"


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys.yaml"
    path.write_text(
        f'- {{name: shop, sha256: "{fingerprint(SHOP)}"}}\n'
        f'- {{name: nightly, sha256: "{fingerprint(NIGHTLY)}", images_per_minute: 3, '
        "megapixel_steps_per_minute: 0.05}\n"
    )
    return path


@pytest.fixture(scope="module")
def config(
    tiny_model_dir: Path, keys_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> ServingConfig:
    return ServingConfig(
        model=str(tiny_model_dir),
        designers=("none",),
        port=free_port(),
        keys=str(keys_file),
        contributions={"store": str(tmp_path_factory.mktemp("kept"))},
        max_pending=10,
        max_output_pixels=1_000_000,
        max_pending_megapixel_steps=2.0,
        uploads={"places": PLACES, "timeout_s": 3, "least_bytes_per_s": 500, "grace_s": 1.5},
    )


@pytest.fixture(scope="module")
def server(ray_cluster: None, config: ServingConfig) -> Iterator[Server]:
    server = start(config)
    yield server
    server.stop()


@pytest.fixture
def http(server: Server) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {SHOP}"}
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as client:
        yield client


def message(response: httpx.Response) -> str:
    return response.json()["error"]["message"]


def test_the_sdk_brings_its_key(server: Server) -> None:
    def paint(key: str) -> int:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        return len(client.images.generate(prompt="a", extra_body={"steps": 1}).data)

    assert paint(SHOP) == 1
    with pytest.raises(openai.AuthenticationError, match="not known"):
        paint("none")


def test_health_is_open_and_the_rest_is_not(server: Server) -> None:
    assert httpx.get(f"{server.url}/healthz").status_code == 200
    for method, path in (("POST", PAINT), ("POST", "/v1/images/edits"), ("GET", "/v1/models")):
        assert httpx.request(method, f"{server.url}{path}").status_code == 401
    foreign = httpx.get(f"{server.url}/healthz", headers={"origin": "https://evil.example"})
    assert foreign.status_code == 403


def test_a_key_may_ask_for_so_much_a_minute_and_hears_how_much_is_left(server: Server) -> None:
    headers = {"authorization": f"Bearer {NIGHTLY}"}
    with httpx.Client(base_url=server.url, timeout=60, headers=headers) as nightly:
        first = nightly.post(PAINT, json={"prompt": "a", "n": 2, "steps": 1})
        assert first.status_code == 200, first.text
        assert first.headers["x-ratelimit-limit-images"] == "3"
        assert first.headers["x-ratelimit-remaining-images"] == "1"
        over = nightly.post(PAINT, json={"prompt": "a", "n": 2, "steps": 1})
        assert over.status_code == 429 and "may ask for 3 images a minute" in message(over)
        assert 1 <= int(over.headers["retry-after"]) <= 20
        assert over.headers["x-ratelimit-remaining-images"] == "1"
        never = nightly.post(PAINT, json={"prompt": "a", "steps": 300})
        assert never.status_code == 400
        costly = nightly.post(PAINT, json={"prompt": "a", "steps": 20})
        assert costly.status_code == 400 and "megapixel-steps" in message(costly)


def wide_png(width: int, height: int) -> bytes:
    return encode_png(Image.new("RGB", (width, height)))


@pytest.mark.parametrize(
    ("width", "n", "steps", "said"),
    [
        (2000, 3, 1, "3 of 2000x400 are 2,400,000 pixels"),
        (1100, 10, 60, "megapixel-steps, more than the 2 that this server takes on"),
    ],
)
def test_work_that_costs_too_much_is_refused_before_it_is_decoded(
    http: httpx.Client, width: int, n: int, steps: int, said: str
) -> None:
    height = 400 if width == 2000 else 80
    fields = {"prompt": "a", "designer": "none", "n": n, "steps": steps}
    # Its pixels are damaged: that is not even looked at.
    whole = wide_png(width, height)
    files = {"image": ("photo", whole[: len(whole) // 2])}
    refused = http.post("/v1/images/edits", data=fields, files=files)
    assert refused.status_code == 400 and said in message(refused), refused.text
    cheap = {**fields, "n": 1, "steps": 1}
    damaged = http.post("/v1/images/edits", data=cheap, files=files)
    assert damaged.status_code == 400 and "damaged" in message(damaged)


def test_slow_uploads_leave_everybody_else_answered(server: Server, http: httpx.Client) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {PAINT} HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {SHOP}\r\n"
        "Content-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    ).encode()
    with contextlib.ExitStack() as stack:
        slow = []
        for _ in range(128):
            sock = stack.enter_context(socket.create_connection((host, int(port)), timeout=30))
            sock.sendall(head)
            slow.append(sock)
        time.sleep(0.5)
        for sock in slow[::7]:
            with contextlib.suppress(OSError):
                sock.sendall(b" ")
        assert httpx.get(f"{server.url}/healthz", timeout=5).status_code == 200
        painted = let_in(lambda: http.post(PAINT, json={"prompt": "a", "steps": 1}, timeout=20))
        assert painted.status_code == 200, painted.text
        picture = encode_png(Image.fromarray(np.zeros((64, 64, 3), np.uint8)))
        edited = let_in(
            lambda: http.post(
                "/v1/images/edits",
                data={"prompt": "a", "steps": 1, "designer": "none"},
                files={"image": ("photo", picture)},
            )
        )
        data = base64.b64decode(edited.json()["data"][0]["b64_json"])
        assert Image.open(io.BytesIO(data)).size == (64, 64)
        answers = [answer_of(sock) for sock in slow]
    assert set(answers) == {"408", "429"}, set(answers)
    assert answers.count("408") >= PLACES  # and as many more as places were free again by then


def let_in(ask: Callable[[], httpx.Response]) -> httpx.Response:
    """The answer, asked for again while all places are of uploads too young to be slow."""
    deadline = time.monotonic() + 20
    while (answer := ask()).status_code == 429 and time.monotonic() < deadline:
        time.sleep(0.1)
    return answer


def answer_of(sock: socket.socket) -> str:
    """The status with which the server gave an upload up."""
    head = sock.recv(100)
    return head.split(b" ")[1].decode()


def test_two_applications_share_a_cluster_and_one_leaves_the_other(
    server: Server, config: ServingConfig, http: httpx.Client
) -> None:
    with pytest.raises(DimError, match="already: set application=NAME"):
        start(config)
    with pytest.raises(DimError, match=f"listens on port {config.port} in this cluster"):
        start(config.model_copy(update={"application": "other", "port": free_port()}))
    other = {"application": "other", "route_prefix": "/other"}
    second = start(config.model_copy(update=other))
    assert second.url == f"{server.url}/other"
    assert httpx.get(f"{second.url}/healthz").json()["running_replicas"]["painter"] == 1
    assert httpx.post(f"{second.url}/v1/images/generations").status_code == 401
    body = {"prompt": "a", "steps": 1}
    assert http.post("/other/v1/images/generations", json=body).status_code == 200
    second.stop()
    assert httpx.get(f"{second.url}/healthz", headers={}).status_code == 401
    assert http.post(PAINT, json=body).status_code == 200


def test_an_edit_is_kept_once_its_client_accepts_it(
    http: httpx.Client, config: ServingConfig
) -> None:
    answer = http.post(
        "/v1/images/edits",
        files={"image": encode_png(Image.new("RGB", (64, 64), "red"))},
        data={"prompt": "blue", "consent": "true", "steps": "1"},
    )
    assert answer.status_code == 200, answer.text
    id = answer.json()["data"][0]["contribution"]
    assert config.contributions is not None
    kept = Path(config.contributions.store)
    assert not list(kept.iterdir())
    stranger = httpx.post(f"{http.base_url}/v1/contributions/{id}/accept")
    assert stranger.status_code == 401
    accepted = http.post(f"/v1/contributions/{id}/accept")
    assert (accepted.status_code, accepted.json()["status"]) == (200, "accepted")
    assert [file.stem for file in kept.glob("records/*")] == [id]
    unknown = http.post(f"/v1/contributions/{'0' * 32}/accept")
    assert unknown.status_code == 404, unknown.text
