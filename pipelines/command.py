"""What the command lines of the data jobs have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Out = Annotated[str, typer.Option(help="Output folder: a local path, file:// or s3://bucket/key.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Further settings: key.sub=value.", show_default=False)
]
ConfigFile = Annotated[Path | None, typer.Option(help="YAML file with settings.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a finished output.")]
RetryFailed = Annotated[
    bool, typer.Option("--retry-failed", help="Make a finished output again if records failed.")
]


def settings(**values: Any) -> list[str]:
    """The options that were given, as overrides; JSON is YAML, so any text survives."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items() if value is not None]
