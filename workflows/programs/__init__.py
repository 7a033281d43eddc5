"""What a step of a workflow can run: the programs that one would run by hand."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from workflows.programs.program import Program

MODULES = {
    "ingest": "data",
    "filter-pairs": "data",
    "filter-images": "data",
    "edit": "data",
    "t2i": "data",
    "features": "features",
    "train": "training",
    "evaluate": "evaluation",
    "register": "registration",
    "serve": "serving",
    "rollout": "serving",
}
"""Where each is. A workflow imports those that it has: torch and the models are seconds of work."""


def module_of(name: str) -> str:
    """What to import for the program ``name``."""
    return f"{__name__}.{MODULES[name]}"


@cache
def program(name: str) -> Program:
    """The program ``name``."""
    found: Program = import_module(module_of(name)).PROGRAMS[name]
    return found
