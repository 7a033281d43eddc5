"""Pictures on their way from the ingress to the other deployments: each is shipped once."""

from __future__ import annotations

import ray
from ray import ObjectRef

INLINE_BYTES = 100_000
"""Up to this Ray sends what a call takes within the call; a larger object has a place in memory."""

Shipped = bytes | ObjectRef
"""Bytes, or where in Ray's object store they lie."""


def ship(data: bytes) -> Shipped:
    """``data`` for any number of calls: what is large lies once on each machine that needs it."""
    if len(data) <= INLINE_BYTES or not ray.is_initialized():
        return data
    return ray.put(data)


async def received(shipped: Shipped) -> bytes:
    """What was shipped. It is held in memory as long as somebody holds ``shipped``."""
    if isinstance(shipped, bytes):
        return shipped
    data: bytes = await shipped
    return data
