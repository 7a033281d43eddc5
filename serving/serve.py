"""``dim serve``: the serving application on this machine's Ray, or on the cluster it runs in."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import typer

from dim.config import load_config
from dim.errors import CheckpointError, DimError
from infra.models import on_this_machine
from infra.registry import located
from infra.storage import open_store
from serving.config import NO_DESIGNER, ServingConfig

APPLICATION = "dim"
QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Server:
    """A running server. ``url`` has no slash at its end."""

    url: str
    owns_ray: bool

    def stop(self) -> None:
        """Stop serving; Ray too, if ``start`` started it."""
        import ray
        from ray import serve

        serve.shutdown()
        if self.owns_ray:
            ray.shutdown()


def start(config: ServingConfig) -> Server:
    """Serve ``config`` and return once every deployment is ready.

    Ray is used as it is when it is initialised in this process, else started (see ``start_ray``).

    Raises:
        CheckpointError: there is no model at ``config.model``.
        DesignerError: a designer spec is unknown.
        DimError: the port is in use, or a deployment did not start; the message says why.
    """
    check(config)

    import ray
    from ray import serve

    from serving.app import build

    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    owns_ray = not ray.is_initialized()
    if owns_ray:
        start_ray()
    server = Server(f"http://{address_to_show(config.host)}:{config.port}", owns_ray)
    try:
        serve.start(http_options={"host": config.host, "port": config.port}, logging_config=QUIET)
        serve.run(build(config), name=APPLICATION, route_prefix="/", logging_config=QUIET)
    except BaseException as error:
        said = failure_of_application() if isinstance(error, RuntimeError) else None
        server.stop()
        if said is not None:
            raise DimError(f"the server did not start: {said}") from error
        raise
    return server


def start_ray() -> None:
    """Join the cluster of ``RAY_ADDRESS``, else start one on this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR)
        return
    # Designer and painter reserve a CPU each; a machine with one core still gets a server.
    ray.init(
        address="local",
        num_cpus=max(4, os.cpu_count() or 1),
        include_dashboard=False,
        logging_level=logging.ERROR,
    )


def check(config: ServingConfig) -> None:
    """Everything that can be known to fail before Ray is started; errors as of ``start``."""
    check_model(config.model, config.lora)
    check_designers(config.designers)
    check_port(config.host, config.port)


def check_model(address: str, lora: Sequence[str] = ()) -> None:
    """Say at once that there is no model, or an adapter that is none of its, before Ray starts."""
    if not open_store(address).is_file("dim.json"):
        raise CheckpointError(f"no model at {address} (a model folder holds a dim.json)")
    if lora:
        from dim.model.lora.merge import check_folder

        check_folder(on_this_machine(address), lora)


def check_designers(specs: Sequence[str]) -> None:
    """Say at once that a designer is unknown, before Ray is started."""
    from dim.designers import check

    for spec in specs:
        if spec not in ("self", NO_DESIGNER):
            check(spec)


def check_port(host: str, port: int) -> None:
    """Raise ``DimError`` when nothing can listen on ``host``:``port``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except PermissionError:
            raise DimError(f"no permission to listen on port {port} of {host}") from None
        except OSError as error:
            raise DimError(
                f"cannot listen on port {port} of {host}: {error.strerror or error}"
            ) from None


def address_to_show(host: str) -> str:
    """What a client on this machine puts into the URL."""
    if host in ("0.0.0.0", "::", ""):  # noqa: S104, nothing is bound here
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host


def failure_of_application() -> str | None:
    """Why the application failed, from the messages that Serve keeps; ``None`` if it did not."""
    from ray import serve

    application = serve.status().applications.get(APPLICATION)
    if application is None:
        return None
    messages = [part.message for part in application.deployments.values()]
    for message in [*messages, application.message]:
        found = re.findall(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)$", message, re.MULTILINE)
        if found:
            return found[-1][1]
    return application.message or None


def main(
    model: str = typer.Option(
        ..., "--model", "-m", help="Folder of a DIM, as `dim train` makes, or models:/NAME@ALIAS."
    ),
    lora: list[str] = typer.Option(
        [], metavar="PATH[:WEIGHT]", help="A LoRA adapter to paint with; may be repeated."
    ),
    port: int = typer.Option(8000, help="The port to listen on."),
    host: str = typer.Option("127.0.0.1", help="The address to listen on; 0.0.0.0 is everywhere."),
    designer: list[str] = typer.Option(
        ["self"],
        help="Who writes blueprints: self, oracle, openai:MODEL@URL, replay:PATH, none. Given "
        "several times, a request chooses by its field `designer`; the first is the default.",
    ),
    overrides: list[str] | None = typer.Argument(
        None, metavar="[KEY=VALUE]...", help="Further settings, such as max_batch_size=16."
    ),
) -> None:
    """Serve edits and generations over HTTP, with OpenAI's routes, until stopped."""
    settings = [
        f"model={located(model)!r}",
        f"lora={list(lora)!r}",
        f"port={port}",
        f"host={host!r}",
        f"designers={list(designer)!r}",
        *(overrides or []),
    ]
    config = load_config(ServingConfig, None, settings)
    check(config)
    start_ray()
    # Only now, because Ray sets its own handler: SIGTERM stops the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server = start(config)
        announce(server, config.offered[0])
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        server.stop()
    finally:
        stop_ray()


def stop_ray() -> None:
    """Leave Ray; one that was started here ends."""
    import ray

    ray.shutdown()


def announce(server: Server, designer: str) -> None:
    """Say where the server is and how to use it."""
    typer.echo(f"serving on {server.url} (designer: {designer}); Ctrl-C stops it")
    typer.echo(f"  open this page: {server.url}/")
    typer.echo(
        f"  curl -s {server.url}/v1/images/edits -F image=@photo.png -F prompt='remove the cup' "
        '| python3 -c \'import base64,json,sys; open("edited.png","wb").write('
        'base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )


if __name__ == "__main__":
    from dim.cli import run

    run(main)
