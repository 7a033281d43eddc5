"""mkdocs' hook: the pages that are made of the code come beside those that are written."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from docs.generate import commands, messages, settings

_PAGES = {
    "reference/settings.md": settings.page,
    "reference/commands.md": commands.page,
    "reference/messages.md": messages.page,
}


def on_config(config: Any) -> Any:
    """Called by mkdocs first: a page that no section of ``mkdocs.yml`` lists is under More."""
    listed = set(_listed(config.nav))
    docs = Path(config.docs_dir)
    more = sorted(str(path.relative_to(docs)) for path in docs.rglob("*.md"))
    if rest := [name for name in more if name not in listed]:
        config.nav = [*config.nav, {"More": rest}]
    return config


def _listed(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for item in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _listed(item)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by mkdocs for each page: what links to a file beside docs/ is a name in the site."""
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:configs|infra|benchmarks)/[^)]+\)", r"\1", markdown)


def on_files(files: Files, config: Any) -> Files:
    """Called by mkdocs when it has listed the files of ``docs/``."""
    for name, make in _PAGES.items():
        files.append(File.generated(config, name, content=make()))
    return files
