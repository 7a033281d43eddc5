"""What the schema at ``/openapi.json`` says beside what FastAPI reads off the routes."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.protocol import (
    BlueprintForm,
    BlueprintRequest,
    EditForm,
    EditRequest,
    ErrorResponse,
)

_REF = "#/components/schemas/{model}"

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorResponse, "description": "What the client can change."},
    "5XX": {"model": ErrorResponse, "description": "What the server could not do."},
}


def _either(form: type[BaseModel], json: type[BaseModel]) -> dict[str, Any]:
    """FastAPI knows a route with a form and one with JSON, but none with either."""
    bodies = {"multipart/form-data": form, "application/json": json}
    content = {
        kind: {"schema": {"$ref": _REF.format(model=model.__name__)}}
        for kind, model in bodies.items()
    }
    return {"requestBody": {"required": True, "content": content}}


EDIT = _either(EditForm, EditRequest)
BLUEPRINT = _either(BlueprintForm, BlueprintRequest)


def describe(app: FastAPI) -> FastAPI:
    """``app`` with a schema that has the bodies which it does not read itself."""
    _, bodies = models_json_schema(
        [
            (model, "validation")
            for model in (EditForm, EditRequest, BlueprintForm, BlueprintRequest)
        ],
        ref_template=_REF,
    )
    schema = app.openapi()  # kept by the application, and given out from then on
    schema["components"]["schemas"].update(bodies["$defs"])
    return app
