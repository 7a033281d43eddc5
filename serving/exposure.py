"""Who reaches the port: a server that others reach needs keys, or the word that it needs none."""

from __future__ import annotations

import ipaddress

from dim.errors import ConfigError
from serving.config import ServingConfig

WITHOUT_KEYS = (
    "without API keys whoever reaches the port may spend what this server costs: make one with "
    "`dim keys new NAME --file FILE` and set keys=FILE, or say insecure=true"
)


def check_exposure(config: ServingConfig, host: str | None) -> None:
    """Refuse to let everybody in who reaches ``host``, unless that is what is wanted.

    Raises:
        ConfigError: it is not loopback, there are no keys, and nobody said ``insecure``.
    """
    if config.keys is None and not config.insecure and host is not None and not is_loopback(host):
        raise ConfigError(f"listening on {host}: {WITHOUT_KEYS}")


def listening_host() -> str | None:
    """The address that Serve's proxies listen on in this cluster; ``None``: no HTTP at all."""
    # With `serve deploy` it is not this application's to say, and no public call tells it.
    from ray.serve.context import _get_global_client

    client = _get_global_client()
    return None if client is None else client.http_config.host


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on ``host``."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
