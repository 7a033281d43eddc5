"""What contributors start from agrees with the project: hooks, container, changelog, picture."""

from __future__ import annotations

import json
import re

import yaml
from PIL import Image

from dim import __version__
from docs.generate import picture
from tests.docs.fences import ROOT


def test_the_hooks_are_the_tools_of_make_check() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    recipe = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    checked = set(re.findall(r"(?:\$\(PY\) -m|\.venv/bin/)\s*(.+)", recipe))
    tools = {re.search(r"ruff check|ruff format|mypy|lint-imports", line)[0] for line in checked}
    assert tools == {re.search(r"ruff check|ruff format|mypy|lint-imports", h)[0] for h in hooks}
    assert all(hook["language"] == "system" for hook in repository["hooks"])


def test_the_devcontainer_makes_the_tested_set() -> None:
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text())
    assert container["postCreateCommand"].endswith("make venv")
    wanted = re.search(r'requires-python = ">=([\d.]+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f"python:{wanted}" in container["image"]


def test_the_changelog_tells_of_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert __version__ in text
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_picture_is_small_and_made_by_its_command(monkeypatch) -> None:
    shown = ROOT / "docs" / "edits.png"
    assert shown.stat().st_size < 100_000

    class Painted:
        class config:
            class sampling:
                resolution = 64

        @staticmethod
        def edit(images, instructions, *, blueprints):
            assert [text.startswith("1. Edit Instruction:") for text in blueprints] == [True] * 4
            return [type("Result", (), {"image": image}) for image in images]

    monkeypatch.setattr(picture.model, "load", lambda path: Painted)
    drawn = picture.rows("a model", seed=1)
    with Image.open(shown) as committed:
        assert committed.size == drawn.size
        left = (0, 0, picture.GAP + picture.SIDE, drawn.height)
        before = committed.convert("RGB").crop(left)
    # The same seed draws the same sources; the palette of the file rounds colours.
    pairs = zip(before.getdata(), drawn.crop(left).getdata(), strict=True)
    off = sum(abs(a - b) for one, other in pairs for a, b in zip(one, other, strict=True))
    assert off / (before.width * before.height * 3) < 4
