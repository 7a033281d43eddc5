"""A stage that ends in the middle, as with the power."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest

from training import loop


@contextmanager
def power_cut(step: int) -> Iterator[None]:
    """What is trained within ends before its ``step``; it is an error if it does not."""
    update = loop.update

    def cut(worker: Any, number: int) -> Any:
        if number == step:
            raise ConnectionError("the power went")
        return update(worker, number)

    with mock.patch.object(loop, "update", cut), pytest.raises(ConnectionError, match="power"):
        yield
