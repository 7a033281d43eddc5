"""A machine: its GPUs and their driver, disk, shared memory, ports, and what is installed."""

from __future__ import annotations

import os
import platform
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dim import __version__
from infra.diagnosis.finding import Finding, Status

FULL, FILLING = 0.95, 0.85
"""Share of a disk in use from which Ray stores nothing more there, and from which it soon may."""
PACKAGES = ("ray", "torch", "transformers", "diffusers", "pyarrow", "mlflow", "numpy")
"""What must be the same on all nodes: objects and checkpoints travel between them."""
_SMI_PATIENCE_S = 30.0


def versions() -> dict[str, str]:
    """What is installed here, by name."""
    found = {"python": platform.python_version(), "dim": __version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found


def examine_machine(folders: Sequence[str] = ()) -> Iterator[Finding]:
    """What there is to say of this machine, and of the disks that ``folders`` are on."""
    yield _gpus()
    yield _shared_memory()
    yield from _disks(folders)


def examine_ports(ports: Sequence[int]) -> Iterator[Finding]:
    """Which of ``ports`` something listens on already."""
    for port in ports:
        check = f"port {port}"
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError as error:
                advice = f"end what listens there (`ss -ltnp sport = {port}` names it), or choose "
                advice += "another port (`dim serve --port N`)"
                yield Finding(check, Status.WARNING, error.strerror or "taken", advice)
            else:
                yield Finding(check, Status.OK, "free")


def _gpus() -> Finding:
    import torch

    check, built = "gpu", torch.version.cuda
    smi = shutil.which("nvidia-smi")
    if smi is None:
        said = f"no driver of NVIDIA here; torch {torch.__version__}"
        if built is None:
            return Finding(check, Status.OK, f"{said} is for CPUs")
        return Finding(check, Status.OK, f"{said} would use CUDA {built}")
    try:
        done = subprocess.run(
            [smi, "-q"], capture_output=True, text=True, timeout=_SMI_PATIENCE_S, check=False
        )
        told, wrong = done.stdout, done.returncode != 0
    except (OSError, subprocess.TimeoutExpired) as error:
        told, wrong = f"{type(error).__name__}", True
    if wrong:
        said = next(iter(told.strip().splitlines()), "no answer")
        return Finding(
            check, Status.FAILED, f"nvidia-smi fails: {said}",
            "load the driver or start the machine anew; a container wants `--gpus all`",
        )  # fmt: skip
    return _driver(told, torch.__version__, built)


def _driver(told: str, torch_version: str, built: str | None) -> Finding:
    """What follows of ``nvidia-smi -q`` for a torch that was built for CUDA ``built``."""
    check = "gpu"
    names = re.findall(r"Product Name\s*: (.+)", told)
    driver = re.search(r"Driver Version\s*: (\S+)", told)
    serves = re.search(r"CUDA (?:UMD )?Version\s*: (\d+)", told)
    said = f"{len(names)} x {names[0].strip()}" if names else "no GPU"
    said += f", driver {driver[1] if driver else 'unknown'}"
    if not names:
        return Finding(check, Status.WARNING, said, "a container wants `--gpus all`")
    if built is None:
        return Finding(
            check, Status.FAILED, f"{said}, but torch {torch_version} is its build for CPUs",
            f"take the image's target `cuda`, or `TORCH=torch=={torch_version.split('+')[0]} "
            "make venv`",
        )  # fmt: skip
    if serves and int(serves[1]) < int(built.split(".")[0]):
        return Finding(
            check, Status.FAILED, f"{said}, which serves CUDA {serves[1]}; torch wants {built}",
            "install NVIDIA's current driver on the machine",
        )  # fmt: skip
    return Finding(check, Status.OK, f"{said}; torch {torch_version} for CUDA {built}")


def _shared_memory() -> Finding:
    from ray._common.utils import get_system_memory
    from ray._private import ray_constants as ray

    check, shared = "shared memory", Path("/dev/shm")  # noqa: S108 - where Linux has it
    if not shared.is_dir():
        return Finding(check, Status.OK, "this system has no /dev/shm; Ray keeps objects in files")
    there, share = shutil.disk_usage(shared).total, ray.DEFAULT_OBJECT_STORE_MEMORY_PROPORTION
    wanted = min(share * get_system_memory(), ray.DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES)
    said = f"{there / 1e9:.1f} GB in {shared}, Ray's object store wants {wanted / 1e9:.1f} GB"
    if there >= wanted:
        return Finding(check, Status.OK, said)
    return Finding(
        check, Status.WARNING, f"{said}, and will be files on disk",
        f"start the container with --shm-size={wanted / 1e9:.0f}g, or give it a volume in memory",
    )  # fmt: skip


def _disks(folders: Sequence[str]) -> Iterator[Finding]:
    wanted = [tempfile.gettempdir(), *folders]
    if cache := os.environ.get("DIM_CACHE"):
        wanted.append(cache)
    for folder in dict.fromkeys(wanted):
        check = f"disk of {folder}"
        try:
            usage = shutil.disk_usage(folder)
        except OSError as error:
            yield Finding(check, Status.FAILED, error.strerror or str(error), "make the folder")
            continue
        used = 1 - usage.free / usage.total
        said = f"{usage.free / 1e9:.1f} GB of {usage.total / 1e9:.1f} GB are free"
        advice = "delete what is not needed, or set RAY_TMPDIR and DIM_CACHE to a larger disk"
        if used > FULL:
            said += f"; Ray stores nothing on a disk that is {FULL:.0%} full"
            yield Finding(check, Status.FAILED, said, advice)
        elif used > FILLING:
            yield Finding(check, Status.WARNING, said, advice)
        else:
            yield Finding(check, Status.OK, said)
