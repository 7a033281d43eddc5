"""The deployments of the application, and what each of them takes of the cluster."""

from __future__ import annotations

import uuid
from typing import Any

from ray import serve
from ray.serve import Application

from serving.config import NO_DESIGNER, PoolConfig, Rates, ServingConfig
from serving.contributions import Contributions
from serving.designer import OtherDesigners
from serving.own_designer import OwnDesigner
from serving.painter import PainterDeployment
from serving.rates import RateMeter
from serving.release import Release
from serving.replicas import Designers

DRAINING_S = 10.0
"""What a replica that is to go has left when its longest request was given up."""


def application(config: ServingConfig, release: Release, ingress: Any) -> Application:
    """The whole application.

    Args:
        config: of the server.
        release: what ``config.model`` means now.
        ingress: the class with the routes,
            ``Ingress(config, designers, painter, meter, contributions)``.
    """
    key = uuid.uuid4().hex
    painter = pool(config, config.painter, "painter", PainterDeployment, config.painter_replicas)
    meter = None
    if config.keys is not None or config.rates != Rates():
        meter = serve.deployment(name="rates", ray_actor_options={"num_cpus": 0})(RateMeter).bind()
    contributions = None
    if config.contributions is not None:
        contributions = serve.deployment(
            name="contributions",
            num_replicas=1,  # what is held is held in it
            ray_actor_options={"num_cpus": 0},
            max_ongoing_requests=4 * config.max_pending,
        )(Contributions).bind(config.contributions)
    return entry(config, ingress).bind(
        config,
        designers(config, release, key),
        painter.bind(batching(config, config.painter), release, key),
        meter,
        contributions,
    )


def designers(config: ServingConfig, release: Release, key: str) -> Designers:
    """A pool for the models of ours, on devices, and one for all others, which take none."""
    asked = {name: each for name, each in config.designers.items() if name != NO_DESIGNER}
    own = [name for name, each in asked.items() if each.is_own]
    others = [name for name in asked if name not in own]
    pools: dict[str, Application] = {}
    if own:
        replicas = config.designer_replicas
        deployment = pool(config, config.designer, "designer", OwnDesigner, replicas)
        bound = deployment.bind(batching(config, config.designer), own, release, key)
        pools |= dict.fromkeys(own, bound)
    if others:
        deployment = serve.deployment(
            name="designers",
            num_replicas=1,  # budgets, limits and kept answers are counted in it
            ray_actor_options={"num_cpus": 0, "num_gpus": 0},
            graceful_shutdown_timeout_s=config.request_timeout_s + DRAINING_S,
            max_ongoing_requests=4 * config.max_pending,
            max_queued_requests=4 * config.max_pending,
            max_constructor_retry_count=2,
        )(OtherDesigners)
        pools |= dict.fromkeys(others, deployment.bind(config, others))
    return Designers(pools)


def pool(
    config: ServingConfig, settings: PoolConfig, name: str, cls: type, replicas: int
) -> serve.Deployment:
    """A deployment of replicas that each hold a model and work through batches."""
    cpus, gpus = settings.num_cpus, settings.num_gpus
    how_many: dict[str, Any] = {"num_replicas": replicas}
    if settings.autoscaling is not None:
        how_many = {"autoscaling_config": settings.autoscaling}
    return serve.deployment(
        name=name,
        ray_actor_options={
            "num_cpus": config.cpus_per_replica if cpus is None else cpus,
            "num_gpus": config.gpus_per_replica if gpus is None else gpus,
        },
        # Room for the batch that is being worked on, and for all that wait: the painter lets
        # those go first that somebody waits for.
        max_ongoing_requests=batching(config, settings).max_batch_size + config.max_pending,
        graceful_shutdown_timeout_s=config.request_timeout_s + DRAINING_S,
        # For each image that is let in, one call that paints it and one that counts its tokens.
        max_queued_requests=2 * config.max_pending,
        max_constructor_retry_count=2,
        **how_many,
    )(cls)


def batching(config: ServingConfig, settings: PoolConfig) -> ServingConfig:
    """``config`` with the batch size of one pool."""
    if settings.max_batch_size is None:
        return config
    return config.model_copy(update={"max_batch_size": settings.max_batch_size})


def entry(config: ServingConfig, ingress: Any) -> serve.Deployment:
    """The deployment with the routes."""
    # It refuses by itself, in OpenAI's shape; its own bounds are the last resort.
    most = 4 * config.max_pending + config.uploads.places
    return serve.deployment(
        name="ingress",
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": config.cpus_per_ingress},
        graceful_shutdown_timeout_s=config.request_timeout_s + DRAINING_S,
        max_ongoing_requests=most,
        max_queued_requests=most,
        backpressure_config={"status_code": 429, "retry_after_s": 2},
        max_constructor_retry_count=2,
    )(ingress)
