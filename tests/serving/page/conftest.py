"""A real browser for the tests of the page, and a server for it to talk to."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serving.page import api_server
from tests.serving.page.api_server import Api

NAMES = ("chromium", "chromium-browser", "google-chrome")
WHAT_IS_MISSING = (
    "the page is tested in Chromium, which is not installed (on Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium, as the system has it.

    Of a module and no longer: while Playwright is there an event loop runs in this thread, and
    tests of other modules could start none.
    """
    program = next(filter(None, map(shutil.which, NAMES)), None)
    if program is None:
        pytest.skip(WHAT_IS_MISSING)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=program,
            # A container's root has no sandbox, and small /dev/shm.
            args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def running_api() -> Iterator[Api]:
    with api_server.running() as api:
        yield api


@pytest.fixture
def api(running_api: Api) -> Api:
    """The server, doing all well and asked nothing yet."""
    running_api.reset()
    return running_api


@pytest.fixture
def open_page(browser: Any, api: Api) -> Iterator[Callable[..., Any]]:
    """``open_page(**options of a browser context)``: the page, ready.

    At the end no script may have failed and nothing have been asked of another origin; a response
    of 4xx or 5xx, which the browser logs too, is for the test to judge.
    """
    contexts: list[Any] = []
    wrong: list[str] = []

    def note_console(message: Any) -> None:
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    def note_request(request: Any) -> None:
        if not request.url.startswith((f"{api.url}/", f"blob:{api.url}/")):
            wrong.append(f"asked {request.url}")

    def open_one(**options: Any) -> Any:
        context = browser.new_context(**options)
        contexts.append(context)
        context.set_default_timeout(10_000)
        page = context.new_page()
        page.on("console", note_console)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", note_request)
        page.goto(api.url)
        return page

    yield open_one
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(open_page: Callable[..., Any]) -> Any:
    """The page on a desktop."""
    return open_page(viewport={"width": 1280, "height": 900})
