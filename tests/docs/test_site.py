"""The pages build as a site, strictly: every link, anchor and reference leads somewhere."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.docs.fences import ROOT

pytest.importorskip("mkdocs", reason="the pages' packages are not installed (extra `docs`)")
pytest.importorskip("mkdocstrings", reason="the pages' packages are not installed (extra `docs`)")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make docs` makes, in a folder of its own."""
    out = tmp_path_factory.mktemp("site")
    build = ["-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    done = subprocess.run(
        [sys.executable, *build], cwd=ROOT, capture_output=True, text=True, timeout=280,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
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
