"""The other deployments as seen from a replica of this application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serving.jobs import DesignJob, EditJob, GenerateJob, Painted, Preview


async def paint(
    painter: DeploymentHandle, job: EditJob | GenerateJob
) -> AsyncIterator[Preview | Painted]:
    """Paint one image: its previews in order, then itself."""
    response: Any = painter.options(stream=True).paint.remote(job)
    async for piece in response:
        yield piece


async def write(designer: DeploymentHandle, job: DesignJob) -> AsyncIterator[str]:
    """A blueprint in pieces, as it is written."""
    response: Any = designer.options(stream=True).write.remote(job)
    async for piece in response:
        yield piece


def running_replicas() -> dict[str, int]:
    """Deployment name → how many of its replicas run, in the application of this replica."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: part.replica_states.get(ReplicaState.RUNNING, 0)
        for name, part in application.deployments.items()
    }
