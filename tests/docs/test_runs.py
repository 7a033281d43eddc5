"""The commands of README and docs that need no GPU, no cloud and no minutes do what pages say.

They are executed as they stand there, page by page, in a folder that holds what a reader has: the
files that a page has its reader write, and a photograph. All of them share one process and one Ray.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image, ImageOps

from dim import cli
from dim.blueprint import Blueprint, plan_prompt
from tests.docs.fences import PAGES, ROOT, Block, Command, blocks

SECONDS = 60


def to_run(page: Path) -> list[Block]:
    """The blocks of a page that are executed, and the files that it has its reader write."""
    found = blocks(page)
    if not any(block.is_shell and not block.needs for block in found):
        return []
    return [block for block in found if block.file or (block.is_shell and not block.needs)]


RUN = [page for page in PAGES if to_run(page)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where a reader sits, with a photograph and its edited version."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    photo = Image.radial_gradient("L").resize((640, 512))
    photo = ImageOps.colorize(photo, "navy", "orange").effect_spread(3)
    photo.save("photo.png")
    ImageOps.grayscale(photo).save("photo-2.png")
    yield tmp_path


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


@pytest.mark.parametrize("page", RUN, ids=[str(page.relative_to(ROOT)) for page in RUN])
def test_the_commands_of_a_page_run(
    page: Path, folder: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for block in to_run(page):
        if block.file:
            (folder / block.file).write_text(block.body)
        else:
            for command in block.commands():
                execute(command, capsys)


def test_the_tutorial_ends_with_a_picture_of_ones_own(
    folder: Path, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos").mkdir()
    os.rename("photo.png", "photos/coffee.jpg")
    for block in to_run(ROOT / "docs" / "tutorial.md"):
        if block.file:
            (folder / block.file).write_text(block.body)
            continue
        for command in block.commands():
            if command.words != ("python", "some_photos.py"):  # the reader has photographs
                execute(command, capsys)
    assert "mine/edit: 3 files with 1 rows are as written" in capsys.readouterr().out
    with Image.open("mine/edited.png") as edited:
        assert edited.size == (640, 512)


@pytest.mark.parametrize("with_target", [False, True])
def test_the_designer_of_the_page_answers_with_a_blueprint(folder: Path, with_target: bool) -> None:
    (block,) = [b for b in blocks(ROOT / "docs" / "how-to" / "designer.md") if b.file]
    Path("designer.py").write_text(block.body)
    design = runpy.run_path("designer.py")["design"]
    asked = {"type": "text", "text": plan_prompt("remove the cup", with_target)}
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
    answer = design({"messages": [{"role": "user", "content": [image, asked]}]})
    blueprint = Blueprint.parse(answer["choices"][0]["message"]["content"])
    assert blueprint.instruction == "remove the cup"
