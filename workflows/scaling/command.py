"""``dim plan``: what the published size takes of machines, calls, money and storage."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from dim.config import load_config, shipped
from dim.errors import InputError
from workflows.scaling import report
from workflows.scaling.costs import load_costs
from workflows.scaling.settings import PlanConfig
from workflows.scaling.stages import stages


def main(
    plan: Annotated[
        str | None,
        typer.Argument(
            metavar="[FILE]", help="Amounts, prices, devices; configs/plan.yaml if not."
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings of it to change: key.sub=value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Say what every stage takes: hours, calls, tokens, dollars, storage, requests, and its knob.

    The costs of the data jobs are measured, the rates of devices and prices are stated in the file.
    """
    if as_json and as_markdown:
        raise InputError("--json and --markdown are two forms; give one")
    given = list(overrides or [])
    if plan is not None and "=" in plan:
        given, plan = [plan, *given], None
    config = load_config(PlanConfig, plan or "configs/plan.yaml", given)
    costs = load_costs(Path(shipped(config.costs)))
    found = list(stages(config, costs))
    if as_json:
        typer.echo(json.dumps(report.in_json(found, config), indent=2))
    elif as_markdown:
        typer.echo(report.in_markdown(found, config, costs))
    else:
        console = Console(soft_wrap=False)
        for table in report.in_terminal(found, config):
            console.print(table)
        console.print(report.said_of(costs))


if __name__ == "__main__":
    from dim.cli import run as run_program

    run_program(main)
