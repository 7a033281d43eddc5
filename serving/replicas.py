"""The other deployments as seen from a replica of this application."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from dim.design import Reply
from serving.errors import NotReadyError
from serving.jobs import DesignJob, EditJob, GenerateJob, Painted, Preview, ReviewJob

logger = logging.getLogger("ray.serve")

LOST = (RayActorError, ReplicaUnavailableError, NotReadyError)
"""What is raised of a replica that died, cannot be reached or stopped painting."""


@dataclass(frozen=True)
class Designers:
    """Every designer of the server as one handle: a job goes to the pool that holds its designer.

    ``pools``: name of a designer → handle of its deployment (an application, until it is bound).
    """

    pools: Mapping[str, Any]

    def options(self, **options: Any) -> Designers:
        """As of a deployment's handle."""
        return Designers({name: pool.options(**options) for name, pool in self.pools.items()})

    @property
    def write(self) -> Method:
        """As of a deployment's handle: ``write.remote(job)``."""
        return Method(self.pools, "write")

    @property
    def review(self) -> Method:
        """As of a deployment's handle: ``review.remote(job)``."""
        return Method(self.pools, "review")


@dataclass(frozen=True)
class Method:
    """A method of whichever pool a job is for."""

    pools: Mapping[str, Any]
    name: str

    def remote(self, job: DesignJob | ReviewJob) -> Any:
        """What the pool's own method returns."""
        return getattr(self.pools[job.designer], self.name).remote(job)


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


async def write(designers: Designers, job: DesignJob) -> AsyncIterator[str]:
    """A blueprint in pieces, as it is written."""
    response: Any = designers.options(stream=True).write.remote(job)
    async for piece in response:
        yield piece


async def review(designers: Designers, job: ReviewJob) -> Reply:
    """What a designer says of a painted image, in ``dim.review``'s form, or why it says nothing."""
    response: Any = designers.review.remote(job)
    return await response


def running_replicas() -> dict[str, int]:
    """Deployment name → how many of its replicas run, in the application of this replica."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: part.replica_states.get(ReplicaState.RUNNING, 0)
        for name, part in application.deployments.items()
    }
