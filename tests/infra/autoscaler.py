"""Ray's autoscaler without a cluster: which nodes it would start for a demand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from dim.config import load_config
from training.stage import StageConfig

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

Demand = list[dict[str, float]]


def wanted_nodes(
    cluster: Mapping[str, Any], demand: Demand, failed: Mapping[str, float] | None = None
) -> dict[str, int]:
    """Nodes by type; ``failed``: 0 for a type of which the cloud has just had none."""
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    config = AutoscalingConfig(dict(cluster), skip_content_hash=True)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=config.get_node_type_configs(),
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make(resources) for resources in demand]
        ),
        recoverable_resource_availabilities=dict(failed or {}),
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    return {launch.instance_type: launch.count for launch in reply.to_launch}


def of_features() -> Demand:
    """What the features job of GPUs asks for."""
    config = yaml.safe_load((CONFIGS / "data-features-gpu.yaml").read_text())
    each = {"CPU": float(config["cpus_per_worker"]), "GPU": config["gpus_per_worker"]}
    return [each] * int(config["workers"])


def of_stage(name: str) -> Demand:
    """What a published stage asks for."""
    config = load_config(StageConfig, CONFIGS / f"dim-4.6b-{name}.yaml")
    assert isinstance(config.workers, int)
    return [{"CPU": float(config.cpus_per_worker), "GPU": 1.0}] * config.workers
