"""The pages build as a site, strictly: every link, anchor and reference leads somewhere."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

from tests.docs.fences import ROOT

pytest.importorskip("mkdocs", reason="the pages' packages are not installed (extra `docs`)")
pytest.importorskip("mkdocstrings", reason="the pages' packages are not installed (extra `docs`)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` makes, elsewhere; in this process, which has the code loaded."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    config = load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(out))
    config.plugins.on_startup(command="build", dirty=False)
    build(config)  # raises where there was a warning
    return out


def read(page: Path) -> str:
    return html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8")))


def test_every_page_is_in_the_site(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix("")
        folder = site / (name.parent if name.name == "index" else name)
        assert (folder / "index.html").is_file(), page
    assert not (site / "generate").exists()


def test_the_reference_is_made_of_the_code(site: Path) -> None:
    assert "checkpoint_minutes" in read(site / "reference/settings/index.html")
    assert "--retry-failed" in read(site / "reference/commands/index.html")
    assert "holds credentials: give them by" in read(site / "reference/messages/index.html")
    python = read(site / "reference/python/index.html")
    assert "Blueprint" in python and "guidance_scale" in python


def test_messages_and_settings_are_found_by_the_search_field(site: Path) -> None:
    entries = json.loads((site / "search" / "search_index.json").read_text())["docs"]
    texts = " ".join(entry["text"] for entry in entries)
    for words in ("has been down for", "calls OpenAI and needs OPENAI_API_KEY", "owner_timeout_s"):
        assert words in texts


def test_diagrams_are_diagrams_and_nothing_is_fetched_but_them(site: Path) -> None:
    page = (site / "architecture" / "index.html").read_text()
    assert page.count('<pre class="mermaid">') == 5
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="https?://(?!.*canonical)', page)
