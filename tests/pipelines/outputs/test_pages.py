from __future__ import annotations

from pathlib import Path

import pytest
from jinja2 import UndefinedError

from pipelines.outputs.pages import render


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a package with a page and a card that show the same."""
    templates = tmp_path / "some_pages/templates"
    templates.mkdir(parents=True)
    (tmp_path / "some_pages/__init__.py").touch()
    for ending in ("html", "md"):
        (templates / f"it.{ending}.j2").write_text("{% if true %}\n<{{ template }}>\n{% endif %}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return "some_pages"


def test_values_are_escaped_in_html_and_left_alone_in_markdown(package: str) -> None:
    """Also where a value has the name of an argument."""
    assert render(package, "it.html.j2", template="<b>") == "<&lt;b&gt;>\n"
    assert render(package, "it.md.j2", template="<b>") == "<<b>>\n"


def test_a_name_without_a_value_is_an_error(package: str) -> None:
    with pytest.raises(UndefinedError, match="template"):
        render(package, "it.md.j2")
