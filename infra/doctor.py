"""``dim doctor``: whether what a job needs is there, and what to do where it is not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from itertools import chain
from typing import Annotated

import typer

from dim.errors import InputError
from dim.redaction import redact
from infra.diagnosis.finding import Finding, Status
from infra.diagnosis.machine import examine_ports
from infra.diagnosis.nodes import Wanted, examine_cluster, examine_node

PORTS = (8000, 8265, 6379)
"""Of the server, Ray's dashboard and Ray's head."""


def main(
    store: Annotated[
        str | None, typer.Option(envvar="DIM_STORE", help="Where data and models lie: s3://…")
    ] = None,
    tracking: Annotated[
        str | None, typer.Option(envvar="MLFLOW_TRACKING_URI", help="The MLflow server.")
    ] = None,
    folder: Annotated[
        list[str] | None, typer.Option(help="A folder whose disk is looked at besides.")
    ] = None,
    port: Annotated[
        list[int] | None, typer.Option(min=1, max=65535, help="A port that is to be free.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
) -> int:
    """Look at credentials, bucket, clock, versions, GPUs, ports, disk, memory and MLflow.

    On the cluster that RAY_ADDRESS names, every node looks for itself; `dim submit -- doctor` asks
    them. Without one it is this machine. The exit code is 1 where something has failed.
    """
    address = os.environ.get("RAY_ADDRESS")
    if address and port:
        raise InputError("--port is of this machine alone: unset RAY_ADDRESS, or leave it out")
    wanted = Wanted(store, tracking, tuple(folder or ()))
    findings = (
        examine_cluster(address, wanted)
        if address
        else chain(examine_node(wanted), examine_ports(port or PORTS))
    )
    if as_json:
        found = [_harmless(finding) for finding in findings]
        typer.echo(json.dumps([asdict(finding) for finding in found], indent=2))
    else:
        found = list(_told(findings))
    return int(any(finding.status is Status.FAILED for finding in found))


def _harmless(finding: Finding) -> Finding:
    return replace(finding, said=redact(finding.said), advice=redact(finding.advice))


def _told(findings: Iterable[Finding]) -> Iterator[Finding]:
    """The same findings, a line each, and what to do below it; how many of each at the end."""
    counts = dict.fromkeys(Status, 0)
    for finding in map(_harmless, findings):
        counts[finding.status] += 1
        where = f"{finding.node}: " if finding.node else ""
        typer.echo(f"{finding.status.value:<8} {where}{finding.check}: {finding.said}")
        if finding.advice:
            typer.echo(f"{'':<8} -> {finding.advice}")
        yield finding
    typer.echo(", ".join(f"{count} {status.value}" for status, count in counts.items() if count))


if __name__ == "__main__":
    from dim.cli import run

    run(main)
