"""The image, its packages and the cluster files agree; the wheel runs where nothing else is."""

from __future__ import annotations

import re
import subprocess
import tomllib
import zipfile
from pathlib import Path

import yaml

from dim import __version__
from tests.wheel import PACKAGES, environment

ROOT = Path(__file__).resolve().parents[2]
CLUSTER = ROOT / "infra" / "cluster"
PINNED = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[a-z0-9,-]+\])?==([^\s\\]+)", re.MULTILINE)


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(*names: str) -> dict[str, str]:
    """What requirement files pin."""
    text = "\n".join((ROOT / name).read_text() for name in names)
    return {canonical(name): version for name, version in PINNED.findall(text)}


# Extras that no image needs: tools of tests and pages, and what only some servers are asked to do.
ASIDE = ("test", "docs", "int8", "c2pa")


def project() -> dict[str, list[str]]:
    """The direct dependencies of the project, by extra; "" are those of all."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    parts = {"": found["dependencies"], **found["optional-dependencies"]}
    return {
        part: [
            canonical(re.match(r"[A-Za-z0-9._-]+", line)[0])
            for line in lines
            if not line.startswith("dim[")
        ]
        for part, lines in parts.items()
    }


def test_constraints_pin_every_direct_dependency() -> None:
    pinned = pins("constraints.txt")
    assert {name for names in project().values() for name in names} <= set(pinned)


def test_the_image_holds_the_tested_set_by_hashes_and_no_test_tools() -> None:
    common, cuda = (f"infra/cluster/requirements{part}.txt" for part in ("", "-cuda"))
    image, tested = pins(common, cuda), pins("constraints.txt")
    runtime = {name for part, names in project().items() if part not in ASIDE for name in names}
    assert runtime <= set(image)
    assert {name: version for name, version in image.items() if name in tested} == {
        name: version for name, version in tested.items() if name in image
    }
    needed = {name for name in image if name not in tested}
    assert all(re.match("torch|triton|nvidia-|cuda-|setuptools", name) for name in needed), needed
    tools = set(project()["test"]) - runtime
    assert {"pytest", "moto", "mypy"} <= tools and not tools & set(image)
    for name in (common, cuda):
        for block in re.split(r"\n(?=[a-z])", (ROOT / name).read_text())[1:]:
            assert "--hash=sha256:" in block
    assert not [name for name in pins(common) if re.match("torch$|triton|nvidia-|cuda-", name)]


def test_files_agree_on_the_versions_and_the_image() -> None:
    pinned = pins("constraints.txt")
    docker = yaml.safe_load((ROOT / "ray_cluster.yaml").read_text())["docker"]
    assert docker["worker_image"].endswith(f"/dim:{__version__}")
    assert docker["head_image"].endswith(f"/dim:{__version__}-cpu")
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    targets = dict(re.findall(r"^FROM (\S+) AS (\w+)$", dockerfile, re.MULTILINE))
    assert targets == {
        f"rayproject/ray:{pinned['ray']}-py311": "tested",
        "tested": "cuda",
    }  # the last of several that begin there
    assert f"torch=={pinned['torch']}+cpu" in dockerfile
    for stage in re.split(r"^FROM ", dockerfile, flags=re.MULTILINE)[3:]:
        commands = [line for line in stage.splitlines() if line and not line.startswith("#")]
        assert commands[-3:] == ["USER ray", "WORKDIR /home/ray/dim", "RUN dim --version"]
    installs = re.findall(r"pip install .*?(?:\n(?! )|$)", dockerfile, re.DOTALL)
    assert all("--no-deps" in line for line in installs)


def run(installed: Path, folder: Path, *command: str) -> str:
    """What a command prints that is started in ``folder``."""
    done = subprocess.run(
        [installed / command[0], *command[1:]],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_that_the_code_reads(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    ours = {
        str(path.relative_to(ROOT))
        for name in PACKAGES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    # What is for whoever builds a cluster is in the repository.
    left_out = {name for name in ours if name.startswith("infra/cluster/")} | {"infra/venv.sh"}
    assert ours - inside == left_out
    assert {name for name in inside - ours if ".dist-info/" not in name} == set()


def test_the_wheel_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed, tmp_path, "python", "-c", "import dim, configs; print(dim.__file__)")
    assert Path(where.strip()).is_relative_to(installed.parent)
    assert run(installed, tmp_path, "dim", "--version") == f"dim {__version__}\n"
    plan = run(
        installed, tmp_path, "dim", "train", "configs/dim-4.6b-edit2.yaml", "workers=[8,16]",
        "--plan", "--model", "configs/dim-4.6b.yaml", "--samples", "233000", "--gpu", "h100",
    )  # fmt: skip
    assert "364,050 of 32 samples" in plan
    # The tiny model, from its weights in the wheel.
    script = (
        "from infra.models import load_initial; from infra.registry import located; "
        "m = load_initial(located('configs/tiny.yaml'), edits=True); m.save('tiny')"
    )
    run(installed, tmp_path, "python", "-c", script)
    assert "painter" in run(installed, tmp_path, "dim", "model", "info", "tiny")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny"]
