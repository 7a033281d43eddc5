"""``dim serve rollout``: a running server moves to another model, without a failed request.

Every replica that holds the model loads the other one beside it and paints with it once. Only when
all of them have is it written down and taken over; until then, and where one of them cannot, the
old one is served.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import typer

from dim.errors import DimError
from dim.failures import explain, find_dim_error
from infra.ray_cluster import join
from serving.release import Release, Served, find_release, write_release

HOLDERS = ("painter", "designer")
"""The deployments that hold the served model, as far as an application has them."""

ANSWER_S = 60.0
"""How long a replica may take for what is no work."""


def roll_out(application: str, model: str | None = None, *, timeout_s: float = 1800.0) -> Release:
    """Move the application to ``model``, or to what its own address means now.

    Args:
        application: Serve's name of it, in the Ray cluster that this process has joined.
        model: folder, ``s3://`` address or ``models:/…``.
        timeout_s: for every replica to load and try it.

    Returns:
        What is served now.

    Raises:
        DimError: there is no such application or model, or a replica cannot serve it; the old one
            is served then.
    """
    from ray import serve

    parts = [name for name in HOLDERS if name in parts_of(application)]
    handles: list[Any] = [serve.get_deployment_handle(name, application) for name in parts]
    served: Served = handles[0].served.remote().result(timeout_s=ANSWER_S)
    release = find_release(model or served.model)
    try:
        for handle in handles:
            tell(handle, "prepare", release, timeout_s=timeout_s)
    except Exception as error:
        for handle in handles:
            tell(handle, "discard")
        raise DimError(f"{served.release.name} is served as before: {reason(error)}") from error
    write_release(served.key, release)  # for replicas that start from now on
    for handle in handles:
        tell(handle, "adopt", release)
    tell(serve.get_deployment_handle("ingress", application), "renew")
    return release


def parts_of(application: str) -> Sequence[str]:
    """The deployments of an application.

    Raises:
        DimError: it does not run, or is none of ours.
    """
    from ray import serve

    running = serve.status().applications
    if application not in running:
        raise DimError(
            f"this cluster serves no application {application!r} "
            f"(it serves {', '.join(sorted(running)) or 'none'})"
        )
    parts = list(running[application].deployments)
    if not {"painter", "ingress"} <= set(parts):
        raise DimError(f"the application {application!r} is no server of `dim serve`")
    return parts


def tell(handle: Any, method: str, *arguments: Any, timeout_s: float = ANSWER_S) -> None:
    """Have every running replica do something, and wait for it."""
    handle.broadcast(method, *arguments).results(timeout_s=timeout_s)


def reason(error: Exception) -> str:
    """Why, in one sentence; what Ray and its workers wrote around it is left out."""
    if isinstance(error, TimeoutError):
        return "the other model was not ready in time"
    known = find_dim_error(error)
    return str(known) if known is not None else explain(error).sentence


def main(
    model: str | None = typer.Argument(
        None,
        help="Folder, s3:// address or models:/NAME@ALIAS; what the server was started with, "
        "looked up anew, if nobody says.",
    ),
    application: str = typer.Option("dim", help="Serve's name of the application."),
    timeout: float = typer.Option(1800.0, help="Seconds for the replicas to load the model."),
) -> None:
    """Move a running server to another model, or another version of it, while it serves."""
    import ray

    try:
        join(
            address=os.environ.get("RAY_ADDRESS", "auto"),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except ConnectionError:
        raise DimError("no Ray cluster runs here; set RAY_ADDRESS to the one that serves") from None
    try:
        release = roll_out(application, model, timeout_s=timeout)
    finally:
        ray.shutdown()
    typer.echo(f"{application} serves {release.name}")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
