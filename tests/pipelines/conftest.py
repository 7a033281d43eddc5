from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chat_server import ChatServer, completion, running


@pytest.fixture
def chat_server() -> Iterator[ChatServer]:
    """A designer that gives a good blueprint to everything, until a test tells it otherwise."""
    with running(lambda request: completion("nothing")) as server:
        yield server
