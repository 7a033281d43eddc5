"""OpenTelemetry: a job, its ranges and stages as spans of one trace, in the driver and in workers.

Off unless ``DIM_TRACING`` names a function that gives span processors, as ``package.module:name``;
drivers and workers must be able to import it. A driver's trace goes on with the one in
``TRACEPARENT``, if there is one. No text of a record is in any span.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from dim.config import StrictModel
from dim.errors import ConfigError
from dim.redaction import redact

VARIABLE, PARENT = "DIM_TRACING", "TRACEPARENT"

_W3C = TraceContextTextMapPropagator()


class Trace(StrictModel):
    """A place in a trace, to take to another process; not traced where ``exporter`` is empty."""

    exporter: str = ""
    parent: str = ""

    @contextmanager
    def span(self, name: str, **attributes: str | float) -> Iterator[None]:
        """What is done inside is a span below this place; its own spans are sent when it ends."""
        if not self.exporter:
            yield
            return
        provider = _provider(self.exporter)
        context = _W3C.extract({"traceparent": self.parent}) if self.parent else Context()
        try:
            with _open(provider, name, context, attributes):
                yield
        finally:
            provider.force_flush()  # a worker of Ray is ended without a word


def here() -> Trace:
    """This place in the trace of this process."""
    exporter = os.environ.get(VARIABLE, "")
    carrier: dict[str, str] = {}
    if exporter:
        _W3C.inject(carrier)
    return Trace(exporter=exporter, parent=carrier.get("traceparent", os.environ.get(PARENT, "")))


@contextmanager
def span(name: str, **attributes: str | float) -> Iterator[None]:
    """What is done inside is a span of the one that is open in this thread, if one is."""
    current = trace.get_current_span()
    if not (_opened and current.is_recording()):
        yield
        return
    with _open(_opened[-1], name, None, attributes):
        yield


@contextmanager
def _open(
    provider: TracerProvider, name: str, context: Context | None, given: dict[str, str | float]
) -> Iterator[None]:
    attributes = {
        f"dim.{key}": redact(value) if isinstance(value, str) else value
        for key, value in given.items()
    }
    tracer = provider.get_tracer("dim")
    with tracer.start_as_current_span(
        name, context, attributes=attributes, record_exception=False, set_status_on_exception=False
    ) as made:
        try:
            yield
        except BaseException as error:  # its text may quote a record
            made.set_status(Status(StatusCode.ERROR, type(error).__name__))
            raise


_opened: list[TracerProvider] = []


@cache
def _provider(exporter: str) -> TracerProvider:
    """The provider of this process for an exporter.

    Raises:
        ConfigError: there is no such function, or it gives no processors.
    """
    module, _, name = exporter.partition(":")
    try:
        processors = list(getattr(importlib.import_module(module), name)())
        provider = TracerProvider(resource=Resource.create({"service.name": "dim"}))
        for processor in processors:
            provider.add_span_processor(processor)
    except Exception as error:
        raise ConfigError(
            f"{VARIABLE}={exporter}: it must be a function package.module:name that gives "
            f"OpenTelemetry's span processors ({type(error).__name__}: {error})"
        ) from None
    _opened.append(provider)
    return provider
