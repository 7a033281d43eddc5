"""OpenTelemetry: what Serve does not see of a request, the painter's steps, as spans of its trace.

Serve makes the spans from the ingress to the painter's replica, and sends them where its
``tracing_config`` says. Without one nothing here costs more than a look.
"""

from __future__ import annotations

from contextvars import Context

from opentelemetry import trace


def is_traced() -> bool:
    """Whether somebody records the trace of what is being done in this context."""
    return trace.get_current_span().is_recording()


def record_step(context: Context, began_ns: int, number: int, company: int) -> None:
    """A step that ends now, of one image.

    Args:
        context: of the request that the image is for.
        began_ns: when the step began, in nanoseconds since the epoch.
        number: of the image's step, from 1.
        company: images that took part in it.
    """

    def record() -> None:
        span = trace.get_tracer("dim").start_span(
            "painter step",
            start_time=began_ns,
            attributes={"dim.step": number, "dim.batch_size": company},
        )
        span.end()

    context.run(record)
