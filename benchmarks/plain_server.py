"""What one writes in an afternoon: FastAPI around the model, one request after the other.

    python -m benchmarks.plain_server MODEL PORT

It is what ``benchmarks.serving_load`` measures ours against: the same model, the same route, PNG in
base64, painting off the event loop, and no batches.
"""

from __future__ import annotations

import base64
import sys
import threading
from typing import Any

import uvicorn
from fastapi import FastAPI

from dim import model
from dim.images import encode_png


def make_app(path: str) -> FastAPI:
    """The server of the model at ``path``."""
    app, painter, one_at_a_time = FastAPI(), model.load(path), threading.Lock()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/v1/images/generations")
    def generate(body: dict[str, Any]) -> dict[str, Any]:
        width, height = map(int, body["size"].split("x"))
        with one_at_a_time:
            (image,) = painter.generate(
                [body["prompt"]], size=(width, height), seeds=[body["seed"]], steps=body["steps"]
            )
        return {"data": [{"b64_json": base64.b64encode(encode_png(image)).decode()}]}

    return app


if __name__ == "__main__":
    uvicorn.run(make_app(sys.argv[1]), port=int(sys.argv[2]), log_level="warning")
