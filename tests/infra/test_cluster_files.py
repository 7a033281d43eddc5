"""The cluster files as Ray itself reads them; no cluster is needed for that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((ROOT / name).read_text())


def test_ray_up_accepts_the_file() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read("ray_cluster.yaml"))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["cpu"]["min_workers"] == types["gpu"]["min_workers"] == 0
    assert types["gpu"]["resources"]["GPU"] > 0
    assert types["head"]["resources"]["CPU"] == 0


def test_files_agree_on_the_versions_and_the_image() -> None:
    from dim import __version__

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    dockerfile = (ROOT / "infra/cluster/Dockerfile").read_text()
    assert f"image: dim:{__version__}" in (ROOT / "ray_cluster.yaml").read_text()
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
