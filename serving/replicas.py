"""The other deployments as seen from a replica of this application."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serving.jobs import Painted


async def whole(response: Any) -> list[Any]:
    """All pieces of a streamed answer."""
    return [piece async for piece in response]


async def together(painter: DeploymentHandle, jobs: Sequence[Any]) -> list[Painted]:
    """Paint all ``jobs`` of a request at once, so that they share a batch; one failure is all's."""

    async def paint(job: Any) -> Painted:
        return (await whole(painter.options(stream=True).paint.remote(job)))[-1]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(paint(job)) for job in jobs]
    return [task.result() for task in tasks]


def running_replicas() -> dict[str, int]:
    """Deployment name → how many of its replicas run, in the application of this replica."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: part.replica_states.get(ReplicaState.RUNNING, 0)
        for name, part in application.deployments.items()
    }
