"""Joining a Ray cluster that is named by its address."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any


def join(address: str | None = None, **options: Any) -> None:
    """``ray.init`` of a cluster that is there, which is shown the token that lies here for it.

    Args:
        address: of its control; ``None``: that in ``RAY_ADDRESS``.
        options: what ``ray.init`` is given besides.

    Raises:
        Exception: whatever Ray raises where it cannot join.
    """
    import ray

    _show_token()
    ray.init(address, **options)


def _show_token() -> None:
    """Have Ray show this user's token.

    Ray does so by itself for a cluster that it starts or finds, and not for one that is named,
    which then refuses it without end. Nothing happens where ``RAY_AUTH_MODE`` says what to do, or
    there is no token.
    """
    if "RAY_AUTH_MODE" in os.environ:
        return
    with suppress(ImportError):  # another Ray, which may do otherwise
        from ray._raylet import (  # type: ignore[attr-defined]
            AuthenticationTokenLoader,
            Config,
        )

        if AuthenticationTokenLoader.instance().has_token(ignore_auth_mode=True):
            os.environ["RAY_AUTH_MODE"] = "token"
            Config.initialize("")  # this process has read its environment before
