"""The cluster files and the packages agree on versions."""

from __future__ import annotations

from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]


def test_files_agree_on_the_versions_and_the_image() -> None:
    from dim import __version__

    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    dockerfile = (ROOT / "infra/cluster/Dockerfile").read_text()
    docker = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]
    assert docker["worker_image"].endswith(f"/dim:{__version__}")
    assert docker["head_image"].endswith(f"/dim:{__version__}-cpu")
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
