"""The other deployments as seen from a replica of this application."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serving.errors import NotReadyError
from serving.jobs import EditJob, GenerateJob, Painted, Preview

logger = logging.getLogger("ray.serve")

LOST = (RayActorError, ReplicaUnavailableError, NotReadyError)
"""What is raised of a replica that died, cannot be reached or stopped painting."""


async def whole(response: Any) -> list[Any]:
    """All pieces of a streamed answer."""
    return [piece async for piece in response]


async def paint(
    painter: DeploymentHandle, job: EditJob | GenerateJob
) -> AsyncIterator[Preview | Painted]:
    """Paint one image: its previews in order, then itself.

    Where the replica dies the job is painted from the start by another, once: it has its seed, so
    that it becomes the same image, and previews that were sent are not sent again. Closing or
    cancelling this generator takes the image out of the painter's batch.
    """
    sent = 0
    for last in (False, True):
        pieces: Any = painter.options(stream=True).paint.remote(job)
        try:
            async for piece in pieces:
                if isinstance(piece, Preview):
                    if piece.number < sent:
                        continue
                    sent = piece.number + 1
                yield piece
            return
        except LOST as error:
            if last:
                raise
            logger.warning("a painter was lost; its image is painted by another: %s", error)
        finally:
            pieces.cancel()


async def together(
    painter: DeploymentHandle, jobs: Sequence[EditJob | GenerateJob]
) -> list[Painted]:
    """Paint all ``jobs`` of a request at once, so that they share a batch; one failure is all's."""

    async def painted(job: EditJob | GenerateJob) -> Painted:
        return [piece async for piece in paint(painter, job) if isinstance(piece, Painted)][-1]

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(painted(job)) for job in jobs]
    return [task.result() for task in tasks]


def running_replicas() -> dict[str, int]:
    """Deployment name → how many of its replicas run, in the application of this replica."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: part.replica_states.get(ReplicaState.RUNNING, 0)
        for name, part in application.deployments.items()
    }
