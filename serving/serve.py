"""``dim serve``: the serving application on this machine's Ray, or on the cluster it runs in."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import signal
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from dim.config import load_config
from dim.errors import ConfigError, DimError
from infra.models import adapter_here, on_this_machine
from infra.ray_cluster import join
from infra.storage import open_store
from serving.config import NAMES_BY_THEMSELVES, NO_DESIGNER, DesignerConfig, ServingConfig
from serving.exposure import check_exposure
from serving.keys import read_source
from serving.release import find_release
from serving.signing import open_signer

ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""Serve runs a replica's own code, and what it asks of others, on event loops of their own, in case
the code blocks. Ours does not, and each hop between threads costs a request time."""

QUIET = {"log_level": "WARNING", "enable_access_log": False}


@dataclass(frozen=True)
class Server:
    """A running application. ``url`` has no slash at its end.

    ``owns_serve``, ``owns_ray``: whether ``start`` started them.
    """

    url: str
    application: str
    owns_serve: bool
    owns_ray: bool

    def stop(self) -> None:
        """Stop serving this application; what ``start`` started for it too, if nobody uses it."""
        import ray
        from ray import serve

        serve.delete(self.application)
        if self.owns_serve and not serve.status().applications:
            serve.shutdown()
        if self.owns_ray:
            ray.shutdown()


def start(config: ServingConfig) -> Server:
    """Serve ``config`` and return once every deployment is ready.

    Ray is used as it is when it is initialised in this process, else started (see ``start_ray``).
    Where Serve runs in it already, the application is one more of its own.

    Raises:
        ConfigError: the server would be open to everybody, or the keys cannot be read.
        CheckpointError: there is no model at ``config.model``.
        DesignerError: a designer spec is unknown.
        DimError: the port is in use, Serve listens on another one in this cluster, or a deployment
            did not start; the message says why.
    """
    import ray
    from ray import serve

    from serving.app import build

    owns_ray = not ray.is_initialized()
    listening = None if owns_ray else listening_port()
    check(config, with_port=listening is None)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if owns_ray:
        start_ray()
        listening = listening_port()
    if listening not in (None, config.port):
        raise DimError(
            f"Serve listens on port {listening} in this cluster, for all its applications: "
            f"set port={listening}"
        )
    if listening is not None and config.tracing is not None:
        raise DimError(
            "Serve runs in this cluster already, and traces what it was started to trace: leave "
            "tracing out, and start Serve with its tracing_config"
        )
    url = f"http://{address_to_show(config.host)}:{config.port}{config.route_prefix.rstrip('/')}"
    server = Server(url, config.application, owns_serve=listening is None, owns_ray=owns_ray)
    try:
        serve.start(
            http_options={"host": config.host, "port": config.port},
            logging_config=QUIET,
            tracing_config=tracing(config),
        )
        refuse_taken(config)
    except BaseException:
        if owns_ray:
            ray.shutdown()
        raise
    try:
        serve.run(
            build(config),
            name=config.application,
            route_prefix=config.route_prefix,
            logging_config=QUIET,
        )
    except BaseException as error:
        failed = isinstance(error, RuntimeError)
        said = failure_of_application(config.application) if failed else None
        server.stop()
        if said is not None:
            raise DimError(f"the server did not start: {said}") from error
        raise
    return server


def tracing(config: ServingConfig) -> dict[str, Any] | None:
    """Serve's ``tracing_config``; ``None``: it traces nothing, unless the environment says so."""
    wanted = config.tracing
    if wanted is None:
        return None
    return {
        "enabled": True,
        "exporter_import_path": wanted.exporter,
        "sampling_ratio": wanted.sampling_ratio,
    }


def listening_port() -> int | None:
    """The port that Serve has in this cluster already; ``None`` where it does not run."""
    from ray.serve.context import _get_global_client

    client = _get_global_client(raise_if_no_controller_running=False)
    return None if client is None else client.http_config.port


def refuse_taken(config: ServingConfig) -> None:
    """Leave alone what others serve in this cluster.

    Raises:
        DimError: there is an application of this name.
    """
    from ray import serve
    from ray.serve.schema import ApplicationStatus

    for name, other in serve.status().applications.items():
        if other.status == ApplicationStatus.DELETING:
            continue
        if name == config.application:
            raise DimError(
                f"the cluster serves an application {name!r} already: set application=NAME and "
                "route_prefix=/PREFIX"
            )


def start_ray() -> None:
    """Join the cluster of ``RAY_ADDRESS``, else start one on this machine."""
    import ray

    if os.environ.get("RAY_ADDRESS"):
        join(logging_level=logging.ERROR)
        return
    with in_environment(ONE_LOOP):  # which the replicas' processes inherit from Ray's
        # Designer and painter reserve a CPU each; a machine with one core still gets a server.
        ray.init(
            address="local",
            num_cpus=max(4, os.cpu_count() or 1),
            include_dashboard=False,
            logging_level=logging.ERROR,
        )


@contextlib.contextmanager
def in_environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set what the environment does not say, for as long as the block runs."""
    new = {name: value for name, value in variables.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def check(config: ServingConfig, *, with_port: bool = True) -> None:
    """Everything that can be known to fail before Ray is started; errors as of ``start``."""
    check_exposure(config, config.host)
    if config.keys is not None:
        read_source(config.keys)
    if config.contributions is not None:
        open_store(config.contributions.store)
    open_signer(config.signing)
    check_model(config.model, config.lora)
    if config.int8:
        require_torchao()
    for spec in config.adapters.values():
        check_model(config.model, [spec])
    check_designers(config.designers)
    if with_port:
        check_port(config.host, config.port)


def check_model(address: str, lora: Sequence[str] = ()) -> None:
    """Say at once that there is no model, or an adapter that is none of its, before Ray starts."""
    release = find_release(address)
    if lora:
        from dim.model.lora.merge import check_folder

        check_folder(on_this_machine(release.address), [adapter_here(spec) for spec in lora])


def require_torchao() -> None:
    """Say at once that 8 bits are not to be had, before Ray is started."""
    from dim.model.quantize import load_torchao

    load_torchao()


def check_designers(designers: Mapping[str, DesignerConfig]) -> None:
    """Say at once that a designer is unknown, before Ray is started."""
    from dim.designers import check

    for designer in designers.values():
        if designer.spec not in ("self", NO_DESIGNER):
            check(designer.spec)


def named(designers: Sequence[str]) -> dict[str, str]:
    """``NAME=SPEC`` or a spec that is a name too, as the command line has them, by name."""
    found: dict[str, str] = {}
    for given in designers:
        name, separator, spec = given.partition("=")
        if not separator or ":" in name:  # in an address
            name, spec = given, given
            if given not in NAMES_BY_THEMSELVES:
                raise ConfigError(
                    f"the designer {given!r} needs a name that clients call it by: write "
                    f"NAME={given}"
                )
        if name in found:
            raise ConfigError(f"two designers are called {name!r}")
        found[name] = spec
    return found


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


def failure_of_application(name: str) -> str | None:
    """Why an application failed, from the messages that Serve keeps; ``None`` if it did not."""
    from ray import serve

    application = serve.status().applications.get(name)
    if application is None:
        return None
    messages = [part.message for part in application.deployments.values()]
    for message in [*messages, application.message]:
        found = re.findall(r"^(?:[\w.]+\.)?(\w*(?:Error|Exception)): (.+)$", message, re.MULTILINE)
        if found:
            return found[-1][1]
    return application.message or None


def main(
    settings: list[str] | None = typer.Argument(
        None,
        metavar="[FILE.yaml] [KEY=VALUE]...",
        help="A configuration such as configs/serve-tiny.yaml, and settings on top of it, such as "
        "max_batch_size=16 or designers.best.deadline_s=30.",
    ),
    model: str | None = typer.Option(
        None, "--model", "-m", help="Folder of a DIM, as `dim train` makes, or models:/NAME@ALIAS."
    ),
    lora: list[str] | None = typer.Option(
        None, metavar="PATH[:WEIGHT]", help="A LoRA adapter to paint with; may be repeated."
    ),
    port: int | None = typer.Option(None, help="The port to listen on; 8000 if nobody says."),
    host: str | None = typer.Option(
        None, help="The address to listen on; 127.0.0.1 if nobody says, 0.0.0.0 is everywhere."
    ),
    designer: list[str] | None = typer.Option(
        None,
        metavar="[NAME=]SPEC",
        help="Who writes blueprints: self, oracle, none, or NAME=openai:MODEL@URL, "
        "NAME=replay:PATH. Given several times, a request chooses by name in its field "
        "`designer`; the first is the default. If nobody says, it is self.",
    ),
    keys: str | None = typer.Option(
        None, help="File of API keys, as `dim keys new` writes it, or env:NAME."
    ),
    insecure: bool = typer.Option(
        False, "--insecure", help="Listen beyond this machine without API keys."
    ),
    ready: Path | None = typer.Option(
        None,
        metavar="FILE",
        help="Where to say, as JSON, the URL and Ray's address once it serves.",
    ),
) -> None:
    """Serve edits and generations over HTTP, with OpenAI's routes, until stopped."""
    said = {
        "model": model,
        "lora": lora,
        "port": port,
        "host": host,
        "designers": named(designer) if designer else None,
        "keys": keys,
        "insecure": insecure or None,
    }
    config = read_settings(settings or [], {key: value for key, value in said.items() if value})
    # The port of a cluster that is there already is not this machine's.
    check(config, with_port=not os.environ.get("RAY_ADDRESS"))
    start_ray()
    # Only now, because Ray sets its own handler: SIGTERM stops the server as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server = start(config)
        announce(server, config.offered[0])
        if ready is not None:
            write_ready(server, ready)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()
        server.stop()
    finally:
        stop_ray()


def read_settings(settings: Sequence[str], options: Mapping[str, Any]) -> ServingConfig:
    """The configuration of a file, if the first of ``settings`` is one, with all else on top.

    Raises:
        ConfigError: a mistake in any of them, or nobody says which model.
    """
    path = settings[0] if settings and "=" not in settings[0] else None
    # JSON is YAML too, which is what an override's value is read as.
    overrides = [f"{name}={json.dumps(value)}" for name, value in options.items()]
    overrides += settings[0 if path is None else 1 :]
    if path is None and not any(override.startswith("model=") for override in overrides):
        raise ConfigError("no model to serve: say --model PATH, or a file that does")
    return load_config(ServingConfig, path, overrides)


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


def write_ready(server: Server, file: Path) -> None:
    """Say where the server is to who started it: ``url``, ``pid``, and ``ray``, to roll out."""
    import ray

    address = ray.get_runtime_context().gcs_address
    said = {"url": server.url, "pid": os.getpid(), "ray": address}
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(said), encoding="utf-8")
    part.replace(file)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
