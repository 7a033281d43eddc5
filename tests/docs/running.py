"""How the commands of a page are executed: as they stand there, in the folder of a reader."""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from dim import cli
from dim.config import CONFIGS
from tests.docs.fences import ROOT, Block, Command, blocks

SECONDS = 60


HERE: frozenset[str] = frozenset()
ON_RAY = frozenset({"ray"})


def to_run(page: Path, there: frozenset[str] = HERE) -> list[Block]:
    """The blocks of a page that are executed where ``there`` is, and the files that it has its
    reader write."""
    found = blocks(page)
    if not any(block.is_shell and block.needs == there for block in found):
        return []
    return [block for block in found if block.file or (block.is_shell and block.needs <= there)]


def sit_down(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be where a reader sits, with a photograph and its edited version."""
    monkeypatch.chdir(folder)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if (plan := CONFIGS / "plan.yaml").is_file():
        shutil.copy(plan, "mine.yaml")  # which a reader has changed
    photo = Image.radial_gradient("L").resize((640, 512))
    photo = ImageOps.colorize(photo, "navy", "orange").effect_spread(3)
    photo.save("photo.png")
    ImageOps.grayscale(photo).save("photo-2.png")


def follow(
    page: Path,
    capsys: pytest.CaptureFixture[str],
    there: frozenset[str] = HERE,
    but: tuple[str, ...] = (),
) -> None:
    """Write the files that a page has its reader write, and execute its commands, in its order."""
    for block in to_run(page, there):
        if block.file:
            Path(block.file).write_text(block.body)
            continue
        for command in block.commands():
            if command.words != but:
                execute(command, capsys)


def execute(command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    """Execute a command as a shell would: ours in this process, what is not in one of its own."""
    match command.words:
        case ("dim", *arguments):
            status = cli.execute(cli.root(), arguments, prog_name="dim")
            assert status == 0, f"{command}: {capsys.readouterr().err}"
        case ("python", script) if script.endswith(".py"):
            runpy.run_path(script, run_name="__main__")
        case ("make", *_):
            run(command, ROOT)
        case _:
            run(command, Path.cwd())


def run(command: Command, folder: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    words = [sys.executable if word == "python" else word for word in command.words]
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
