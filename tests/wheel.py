"""The project as a wheel, installed where no checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("dim", "pipelines", "training", "serving", "workflows", "infra", "configs")


def build(source: Path, out: Path) -> Path:
    """The wheel, built in ``source`` of a copy that holds what an image's build is given."""
    skipped = shutil.ignore_patterns("__pycache__")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, source / name, ignore=skipped)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120
    )
    (made,) = out.glob("*.whl")
    return made


def install(wheel: Path, home: Path) -> Path:
    """The programs of an environment in ``home`` with the wheel; other packages are this one's."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", home], check=True, timeout=60)
    python = home / "bin" / "python"
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-index",
         "--no-deps", "--disable-pip-version-check", wheel],
        check=True, timeout=120, env=environment(),
    )  # fmt: skip
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_path("purelib"))
    return home / "bin"


def environment() -> dict[str, str]:
    """This process's variables, without the path to a checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
