"""Ray's token, for a cluster that is named by its address."""

from __future__ import annotations

import os
from contextlib import suppress


def show_token() -> None:
    """Have Ray show this user's token to the cluster that ``ray.init`` is about to join.

    Ray does so by itself for a cluster that it starts or finds, and not for the one in
    ``RAY_ADDRESS``, which then refuses it without end. Nothing happens where ``RAY_AUTH_MODE`` says
    what to do, or there is no token.
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
