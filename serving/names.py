"""What clients call the model, and its adapters."""

from __future__ import annotations

import difflib

from dim.redaction import redact
from serving.config import ServingConfig
from serving.errors import BadRequestError, NotFoundError

ALIAS = "dim"
"""What every served model may be called."""


def adapter_of(config: ServingConfig, model: str | None) -> str | None:
    """The adapter in a request's ``model``: that of ``NAME:ADAPTER``, none of ``NAME``.

    Raises:
        NotFoundError: no such model is served, or it has no such adapter.
    """
    name, separator, adapter = (model or ALIAS).partition(":")
    if name in (ALIAS, config.model_name) and (not separator or adapter in config.adapters):
        return adapter or None
    offered = [config.model_name, *(f"{config.model_name}:{each}" for each in config.adapters)]
    raise NotFoundError(
        f"model: {model!r} is not served here; {', '.join(map(repr, offered))} "
        f"{'are' if len(offered) > 1 else 'is'}",
        param="model",
        code="model_not_found",
    )


def chosen_adapter(config: ServingConfig, model: str | None, adapter: str | None) -> str | None:
    """The adapter that a request asks for, by its field or with its model.

    Raises:
        NotFoundError: see ``adapter_of``.
        BadRequestError: there is none of this name, or two are asked for.
    """
    with_model = adapter_of(config, model)
    if adapter is None:
        return with_model
    if adapter not in config.adapters:
        near = difflib.get_close_matches(adapter, config.adapters, n=1)
        meant = f"; did you mean {near[0]!r}?" if near else ""
        raise BadRequestError(
            f"adapter: no adapter {redact(adapter)!r} is offered here "
            f"(there are: {', '.join(config.adapters) or 'none'}){meant}",
            param="adapter",
        )
    if with_model not in (None, adapter):
        raise BadRequestError(
            f"adapter: it is {adapter!r}, and model says {with_model!r}; give one", param="adapter"
        )
    return adapter
