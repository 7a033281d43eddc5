"""What the schema at ``/openapi.json`` says beside what FastAPI reads off the routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.protocol import EditForm, EditRequest, ErrorResponse

_REF = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What the client can change."},
    "5XX": {"model": ErrorResponse, "description": "What the server could not do."},
}

# FastAPI knows a route with a form and one with JSON, but none with either.
_BODIES: dict[str, type[BaseModel]] = {
    "multipart/form-data": EditForm,
    "application/json": EditRequest,
}
EDIT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": {"$ref": _REF.format(model=model.__name__)}}
            for kind, model in _BODIES.items()
        },
    }
}


def describe(app: FastAPI) -> FastAPI:
    """``app`` with a schema that has the bodies which it does not read itself."""
    _, bodies = models_json_schema(
        [(model, "validation") for model in _BODIES.values()], ref_template=_REF
    )
    schema = app.openapi()  # kept by the application, and given out from then on
    schema["components"]["schemas"].update(bodies["$defs"])
    return app
