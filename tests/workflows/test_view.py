"""What a terminal shows while a workflow runs."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from workflows.view import View


def shown(view: View, console: Console, nodes_usd: float | None = None) -> str:
    """What it shows now."""
    file = console.file
    assert isinstance(file, io.StringIO)
    file.seek(0)
    file.truncate()
    view.refresh(nodes_usd)
    return file.getvalue()


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, color_system=None, width=100)


def test_a_step_shows_how_far_it_is_and_what_it_has_paid(console: Console) -> None:
    with View(console, ["edit", "train"]) as view:
        view.begin("edit", Path("edit.log"))
        view.tell("edit", 0.25, "5 of 20 ranges · 2 a minute", 1.255)
        (line,) = (line for line in shown(view, console).splitlines() if "edit" in line)
        assert line.split()[1] == "runs" and "1.25 25% 5 of 20 ranges · 2 a minute" in " ".join(
            line.split()
        )
        assert "for nodes" not in shown(view, console)
        view.tell("edit", 0.5, "10 of 20 ranges", 2.5)
        assert "$1,234.50 for nodes in this run, $2.50 paid by steps" in shown(
            view, console, 1234.5
        )
        view.done("edit", "20 records", 61.0, 4.75)
        done = shown(view, console, 0.0)
    assert "4.75" in done and "1:01" in done and "$4.75 paid by steps" in done


def test_where_no_table_can_be_a_line_tells_of_each_change() -> None:
    file = io.StringIO()
    with View(Console(file=file), ["edit"]) as view:
        view.begin("edit", Path("edit.log"))
        view.tell("edit", 0.5, "10 of 20 ranges", 2.5)
        view.refresh(1.0)
        view.done("edit", "20 records", 61.0, 4.75)
    assert file.getvalue() == "edit: begins (log: edit.log)\nedit: 20 records (1:01)\n"
