"""What the server gives a browser, without a browser."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from fastapi import FastAPI
from ray import cloudpickle
from starlette.applications import Starlette
from starlette.testclient import TestClient

from serving import page

FILES = {
    "/": "text/html",
    "/page/page.js": "javascript",
    "/page/page.css": "text/css",
    "/page/icon.svg": "image/svg+xml",
}


@pytest.fixture(scope="module")
def client() -> TestClient:
    app = FastAPI()
    app.router.routes.extend(page.routes)
    return TestClient(app)


@pytest.mark.parametrize(("path", "kind"), FILES.items())
def test_every_file_comes_with_its_type_and_policy(
    client: TestClient, path: str, kind: str
) -> None:
    got = client.get(path)
    assert got.status_code == 200 and kind in got.headers["content-type"]
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["referrer-policy"] == "no-referrer"
    assert got.headers["cache-control"] == "no-cache"
    policy = got.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';")
    assert "unsafe" not in policy and "http" not in policy and "data:" not in policy

    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(got.content))

    again = client.get(path, headers={"If-None-Match": got.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path",
    [
        "/page/",
        "/page/index.html",
        "/page/__init__.py",
        "/page/../__init__.py",
        "/page/%2e%2e/__init__.py",
        "/page/..%2f..%2fapp.py",
        "/page//etc/passwd",
        "/page/page.js/more",
        "/page/%00",
        "/index.html",
        "/__init__.py",
    ],
)
def test_nothing_else_is_served(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_the_page_is_read_only(client: TestClient) -> None:
    assert client.post("/").status_code == 405
    assert client.put("/page/page.js").status_code == 405


def test_the_routes_travel_by_value_and_find_their_files_where_they_arrive() -> None:
    travelling = cloudpickle.dumps(page.routes)
    folder = str(Path(page.__file__).parent).encode()
    assert folder not in travelling  # another node has the package elsewhere
    arrived = TestClient(Starlette(routes=cloudpickle.loads(travelling)))
    for path in FILES:
        assert arrived.get(path).status_code == 200


class Outside(HTMLParser):
    """What a page loads, and what in it a strict policy forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.inline: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if address := values.get("src") or values.get("href"):
            self.loaded.append(address)
        if tag == "style" or (tag == "script" and "src" not in values):
            self.inline.append(tag)
        self.inline += [name for name in values if name == "style" or name.startswith("on")]


def test_the_page_loads_its_own_files_only_and_holds_no_code(client: TestClient) -> None:
    reader = Outside()
    reader.feed(client.get("/").text)
    assert {f"/{address}" for address in reader.loaded} == set(FILES) - {"/"}
    assert reader.inline == []


def test_no_text_from_outside_becomes_markup(client: TestClient) -> None:
    script = client.get("/page/page.js").text
    forbidden = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function"
    assert re.findall(forbidden, script) == []
    assert "localStorage" not in script
