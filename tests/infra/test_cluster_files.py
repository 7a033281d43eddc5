"""The cluster files as Ray itself reads them; no cluster is needed for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from serving.config import ServingConfig
from serving.exposure import check_exposure

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def kuberay_node_types(cluster_spec: dict[str, Any]) -> dict[str, Any]:
    """The autoscaler's view of a KubeRay cluster."""
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    resource = {
        "metadata": {"name": "dim", "namespace": "default"},
        "spec": cluster_spec,
    }
    return _derive_autoscaling_config_from_ray_cr(resource)["available_node_types"]


def test_ray_up_accepts_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read("ray_cluster.yaml"))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["cpu"]["min_workers"] == types["gpu"]["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] > 0
    assert types["head"]["resources"]["CPU"] == 0


@pytest.mark.parametrize(
    ("name", "where", "groups"),
    [
        ("infra/cluster/raycluster.yaml", [], {"cpu": 0, "gpu": 8}),
        ("infra/cluster/rayservice.yaml", ["rayClusterConfig"], {"gpu": 1}),
    ],
)
def test_kuberay_groups_start_from_zero_with_their_gpus(
    name: str, where: list[str], groups: dict[str, int]
) -> None:
    spec = read(name)["spec"]
    for key in where:
        spec = spec[key]
    types = kuberay_node_types(spec)
    for group, gpus in groups.items():
        assert types[group]["min_workers"] == 0 < types[group]["max_workers"]
        assert types[group]["resources"].get("GPU", 0) == gpus
        assert types[group]["resources"]["CPU"] > 0
    head = next(kind for name, kind in types.items() if name not in groups)
    assert head["resources"]["CPU"] == 0


def test_the_service_passes_a_valid_configuration_to_the_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    text = read("infra/cluster/rayservice.yaml")["spec"]["serveConfigV2"]
    schema = ServeDeploySchema.model_validate(yaml.safe_load(text))
    application = schema.applications[0]
    config = ServingConfig.model_validate(application.args)
    assert config.model_name == "dim-4.6b"
    assert schema.http_options.host == "0.0.0.0"
    check_exposure(config, schema.http_options.host)
    assert config.keys is not None
    head = read("infra/cluster/rayservice.yaml")["spec"]["rayClusterConfig"]["headGroupSpec"]
    (container,) = head["template"]["spec"]["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(Path(config.keys).parent) == mounts["api-keys"]
    assert application.import_path == "serving.app:build"


def test_files_agree_on_the_versions_and_the_image() -> None:
    from dim import __version__

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    texts = [
        (ROOT / name).read_text()
        for name in (
            "infra/cluster/raycluster.yaml",
            "infra/cluster/rayservice.yaml",
            "ray_cluster.yaml",
        )
    ]
    dockerfile = (ROOT / "infra/cluster/Dockerfile").read_text()
    assert all(f"image: dim:{__version__}" in text for text in texts)
    assert all(f'rayVersion: "{pinned["ray"]}"' in text for text in texts[:2])
    assert f"FROM rayproject/ray:{pinned['ray']}-" in dockerfile
    assert f"ARG TORCH=torch=={pinned['torch']}" in dockerfile


def test_constraints_pin_every_direct_dependency() -> None:
    import re
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + project["optional-dependencies"]["test"]
    names = {re.match(r"[A-Za-z0-9._-]+", requirement)[0].lower() for requirement in wanted}
    pinned = {
        line.split("==")[0].lower()
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    }
    assert names <= pinned
