"""The other deployments as seen from a replica of this application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import ReplicaState

from serving.jobs import DesignJob, EditJob, GenerateJob, Painted, Preview


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
    def write(self) -> Writing:
        """As of a deployment's handle: ``write.remote(job)``."""
        return Writing(self.pools)


@dataclass(frozen=True)
class Writing:
    """The method ``write`` of whichever pool a job is for."""

    pools: Mapping[str, Any]

    def remote(self, job: DesignJob) -> Any:
        """What the pool's own ``write.remote`` returns."""
        return self.pools[job.designer].write.remote(job)


async def paint(
    painter: DeploymentHandle, job: EditJob | GenerateJob
) -> AsyncIterator[Preview | Painted]:
    """Paint one image: its previews in order, then itself."""
    response: Any = painter.options(stream=True).paint.remote(job)
    async for piece in response:
        yield piece


async def write(designers: Designers, job: DesignJob) -> AsyncIterator[str]:
    """A blueprint in pieces, as it is written."""
    response: Any = designers.options(stream=True).write.remote(job)
    async for piece in response:
        yield piece


def running_replicas() -> dict[str, int]:
    """Deployment name → how many of its replicas run, in the application of this replica."""
    application = serve.status().applications[serve.get_replica_context().app_name]
    return {
        name: part.replica_states.get(ReplicaState.RUNNING, 0)
        for name, part in application.deployments.items()
    }
