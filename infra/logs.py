"""Structured logs: what jobs and stages do, as one JSON object a line with the ids of what it is.

With ``DIM_LOG=json`` Ray's own structured logging is on, in the driver and in every worker of its
job: it adds the ids of job, node, worker, task and actor. Without it nothing is written here.
"""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from dim.errors import ConfigError
from dim.redaction import redact

if TYPE_CHECKING:
    from ray import LoggingConfig

VARIABLE = "DIM_LOG"

_LOG = logging.getLogger("dim.events")
_LOG.setLevel(logging.INFO)  # whatever a library makes of the root's


def ray_logging() -> LoggingConfig | None:
    """What ``ray.init`` takes as ``logging_config``.

    Raises:
        ConfigError: the variable says something else than json.
    """
    wanted = os.environ.get(VARIABLE, "")
    if wanted not in ("", "json"):
        raise ConfigError(f"{VARIABLE}={wanted}: only json is known; leave it out for no log")
    if not wanted:
        return None
    from ray import LoggingConfig

    return LoggingConfig(encoding="JSON")


def log(message: str, **fields: str | float | None) -> None:
    """Write a line, where structured logs are on in this process.

    Args:
        message: what happened, always in the same words.
        fields: of what: ``data_job``, ``output``, ``range``, ``stage``, ``record``, ``run`` and
            numbers. Texts lose the credentials of addresses.
    """
    if not _is_on():
        return
    safe = {
        key: redact(value) if isinstance(value, str) else value for key, value in fields.items()
    }
    _LOG.info(message, extra=safe)


def _is_on() -> bool:
    from ray._common.formatters import JSONFormatter

    handlers = logging.getLogger().handlers
    return any(isinstance(each.formatter, JSONFormatter) for each in handlers)
