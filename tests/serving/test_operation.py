"""Models, blueprints and readiness, with parts that need no Ray."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dim.errors import DesignerError
from serving import operation
from tests.serving.fakes import BLUEPRINT, Method, Server, data_url, picture
from tests.serving.test_streams import read


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Running replicas by their deployment; a test may change them."""
    parts = {"ingress": 1, "designer": 1, "painter": 1}
    monkeypatch.setattr(operation, "running_replicas", lambda: parts)
    return parts


def design(server: Server, **fields: Any) -> Any:
    data = {"prompt": "remove the cup", **fields}
    return server.http.post("/v1/blueprints", data=data, files={"image": ("a.png", picture())})


def test_a_blueprint_alone(server: Server) -> None:
    form = design(server)
    body = {"prompt": "remove the cup", "images": [data_url(picture())]}
    json = server.http.post("/v1/blueprints", json=body)
    assert form.status_code == json.status_code == 200
    answer = form.json()
    assert answer == json.json()
    assert (answer["object"], answer["designer"]) == ("blueprint", "self")
    assert answer["blueprint"] == BLUEPRINT
    assert answer["sections"]["edit_area"] == "edit area localization of it"
    assert list(answer["sections"]) == [
        "instruction",
        "global_layout",
        "local_objects",
        "edit_area",
        "imagination",
    ]
    assert not server.painter.jobs


def test_a_blueprint_is_streamed(server: Server) -> None:
    found = read(design(server, stream="true"))
    assert [name for name, _ in found] == ["blueprint.delta", "blueprint.delta", "blueprint.done"]
    assert found[-1][1]["blueprint"] == BLUEPRINT


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"designer": "none"}, "designer", "writes no blueprint"),
        ({"designer": "gpt"}, "designer", "not offered"),
        ({"steps": "3"}, "steps", "no field 'steps'"),
        ({"prompt": " "}, "prompt", "blank"),
    ],
)
def test_a_blueprint_that_cannot_be_is_refused(
    server: Server, fields: dict, param: str, said: str
) -> None:
    error = design(server, **fields).json()["error"]
    assert error["param"] == param and said in error["message"]
    assert not server.designer.jobs


def test_a_failing_designer_is_a_502(server: Server) -> None:
    server.designer.pieces, server.designer.error = (), DesignerError("it is down")
    assert design(server).status_code == 502


@pytest.mark.parametrize(
    ("text", "section", "said"),
    [
        (BLUEPRINT, None, "this is a blueprint"),
        (BLUEPRINT.replace("4. Edit Area", "4. Nothing"), "edit_area", "is missing"),
        (BLUEPRINT.replace("local object perception of it", ""), "local_objects", "is empty"),
        ("remove the cup", None, "none of the five"),
    ],
)
def test_a_check_names_the_section(
    server: Server, text: str, section: str | None, said: str
) -> None:
    answer = server.http.post("/v1/blueprints/check", json={"blueprint": text}).json()
    assert answer["section"] == section and said in answer["message"]
    assert answer["valid"] == (text == BLUEPRINT)
    assert answer["blueprint"] == (BLUEPRINT if answer["valid"] else None)


def test_a_check_cleans_what_it_reads(server: Server) -> None:
    rest = BLUEPRINT.split("\n\n", 1)[1].replace(
        "2. Global Layout Perception", "**2. Global Layout**"
    )
    answer = server.http.post(
        "/v1/blueprints/check", json={"blueprint": rest, "prompt": "remove the cup"}
    ).json()
    assert answer["valid"], answer
    assert answer["blueprint"].startswith("1. Edit Instruction: remove the cup")


def test_the_served_model_is_listed(server: Server) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["id"] == "edit2" and model["designers"] == ["self", "none"]
    assert server.http.get("/v1/models/edit2").json() == model
    assert server.http.get("/v1/models/dim").json() == model
    missing = server.http.get("/v1/models/gpt-image-1")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"


def test_alive_is_not_ready(server: Server, running: dict[str, int]) -> None:
    running["painter"] = 0
    assert server.http.get("/livez").json()["status"] == "alive"
    waiting = server.http.get("/readyz")
    assert waiting.status_code == 503 and "painter" in waiting.json()["message"]
    running["painter"] = 1
    assert server.http.get("/readyz").status_code == 200


def test_ready_is_warm(
    server: Server, running: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation, "WARM_UP_S", 0.02)
    painted = asyncio.Event()
    server.painter.warm = Method(painted.wait)
    with server.http as http:  # one event loop for all requests
        waiting = http.get("/readyz")
        assert waiting.status_code == 503 and "warming up" in waiting.json()["message"]
        assert http.portal is not None
        http.portal.call(painted.set)
        assert http.get("/readyz").json()["status"] == "ready"


def test_a_warm_up_that_fails_is_tried_again(server: Server, running: dict[str, int]) -> None:
    server.painter.error = RuntimeError("no memory")
    failed = server.http.get("/readyz")
    assert failed.status_code == 503 and "no memory" not in failed.text
    server.painter.error = None
    assert server.http.get("/readyz").status_code == 200
