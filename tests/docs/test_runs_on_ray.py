"""The commands of README and docs that start a Ray do what pages say, all of them on one Ray."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.docs.fences import PAGES, ROOT
from tests.docs.running import ON_RAY, follow, sit_down, to_run

TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES_HERE = [page for page in PAGES if to_run(page, ON_RAY) and page != TUTORIAL]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> Path:
    sit_down(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_HERE, ids=[str(p.relative_to(ROOT)) for p in PAGES_HERE])
def test_the_commands_of_a_page_run(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(page, capsys, ON_RAY)


@pytest.mark.slow
def test_the_tutorial_ends_with_a_picture_of_ones_own(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "photos").mkdir()
    os.rename("photo.png", "photos/coffee.jpg")
    # The reader has photographs.
    follow(TUTORIAL, capsys, ON_RAY, but=("python", "some_photos.py"))
    with Image.open("mine/edited.png") as edited:
        assert edited.size == (640, 512)
