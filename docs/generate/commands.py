"""The page of all commands and their options, out of the command line itself."""

from __future__ import annotations

import re
from typing import Any

from dim.cli import COMMANDS, command_of, load

_INTRO = """# Every command

Made of the command line by `make docs`; `--help` after any command says the same. A setting that
has no option is said as `key=value`: [every setting](settings.md).
"""


def page() -> str:
    """The page, in Markdown: a section for each command."""
    return "\n".join([_INTRO, *(_section(name) for name in COMMANDS)])


def _section(name: str) -> str:
    target, _ = COMMANDS[name]
    command = command_of(load(target), name=name)
    rows = [
        f"| {_names(parameter)} | {_cell(getattr(parameter, 'help', None) or '')} |"
        for parameter in command.params
        if not getattr(parameter, "hidden", False)
    ]
    about = " ".join((command.help or "").split("\f")[0].split())
    table = ["| argument or option | |", "| --- | --- |", *rows] if rows else []
    return "\n".join([f"## `dim {name}`", "", about, "", *table, ""])


def _names(parameter: Any) -> str:
    names = [*parameter.opts, *parameter.secondary_opts]
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    return ", ".join(f"`{name}`" for name in names)


def _cell(text: str) -> str:
    return re.sub(r"\|", r"\\|", " ".join(text.split()))


if __name__ == "__main__":
    print(page())
