"""The troubles listed in docs/serving.md name tests that exist, and none is without an answer."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADING = "## What users of other servers run into"
NAMED = re.compile(r"`([\w/.]+\.py)::(test_\w+)`")


def rows() -> list[list[str]]:
    """The cells of the table's rows, without its head."""
    section = (ROOT / "docs" / "serving.md").read_text().split(HEADING)[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_every_test_that_is_named_exists() -> None:
    named = [found for _, here in rows() for found in NAMED.findall(here)]
    assert len(named) > 30
    for file, test in named:
        path = ROOT / (file if file.startswith("tests/") else f"tests/serving/{file}")
        assert path.is_file(), file
        assert re.search(rf"^(async )?def {test}\(", path.read_text(), re.MULTILINE), (file, test)


def test_every_trouble_has_a_test_or_a_benchmark() -> None:
    assert len(rows()) >= 30
    for trouble, here in rows():
        assert NAMED.search(here) or "python -m benchmarks." in here, trouble
