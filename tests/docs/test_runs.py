"""The commands of README and docs that are not marked as needing something do what pages say."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from dim.blueprint import Blueprint, plan_prompt
from tests.docs.fences import PAGES, ROOT, blocks
from tests.docs.running import execute, follow, sit_down, to_run

PAGES_HERE = [page for page in PAGES if to_run(page)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    sit_down(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("page", PAGES_HERE, ids=[str(p.relative_to(ROOT)) for p in PAGES_HERE])
def test_the_commands_of_a_page_run(
    page: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    follow(page, capsys)


def test_a_command_that_fails_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = folder / "page.md"
    page.write_text("```bash\ndim model info nowhere\n```\n")
    (block,) = blocks(page)
    with pytest.raises(AssertionError, match=r"page\.md:1: dim model info nowhere"):
        execute(next(block.commands()), capsys)


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
