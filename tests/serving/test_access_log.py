"""The access log: a line for each request, whatever becomes of it, and nothing private in it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray.exceptions import TaskCancelledError

from serving.access import Observed, open_log
from serving.account import Account
from serving.config import AccessLogConfig, ServingConfig
from serving.jobs import EditJob, Painted
from serving.keys import fingerprint, make_key
from tests.serving.fakes import Method, Server, picture

PROMPT = "remove my \x1b[31m secret\ncup"


class Log:
    """A server, and the lines that it has logged."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.server = Server(access_log={"to": str(folder), **settings.pop("log", {})}, **settings)
        self.http = self.server.http

    def lines(self) -> list[dict[str, Any]]:
        (file,) = self.folder.iterdir()
        return [json.loads(line) for line in file.read_text().splitlines()]

    @property
    def last(self) -> dict[str, Any]:
        return self.lines()[-1]


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "log")


def edit(log: Log, headers: Any = None, **fields: Any) -> Any:
    return log.http.post(
        "/v1/images/edits", files={"image": picture()}, headers=headers,
        data={"prompt": PROMPT, **fields},
    )  # fmt: skip


def test_a_request_is_a_line(log: Log) -> None:
    async def paint(job: EditJob) -> AsyncIterator[Painted]:
        yield Painted(picture(), 2, 1, "dim/1", waited_s=0.5 + job.seed, painted_s=1.25)

    log.server.painter.paint = Method(paint)
    answer = edit(log, n="2", seed="1")
    (line,) = log.lines()
    assert line.pop("request_id") == answer.headers["x-request-id"]
    assert line.pop("ms") > 0 and line.pop("designed_ms") >= 0 and line.pop("time")
    assert line == {
        "client": "anonymous",
        "method": "POST",
        "route": "/v1/images/edits",
        "status": 200,
        "complete": True,
        "waited_ms": 2500.0,
        "painted_ms": 1250.0,
        "images": 2,
        "megapixel_steps": pytest.approx(2 * 5 * 0.0041, rel=0.2),
    }


def test_texts_and_pictures_are_not_in_it_unless_prompts_are_asked_for(tmp_path: Path) -> None:
    quiet = Log(tmp_path / "quiet")
    edit(quiet)
    text = json.dumps(quiet.lines())
    assert "secret" not in text and "a.png" not in text and "prompt" not in text
    telling = Log(tmp_path / "telling", log={"prompts": True})
    edit(telling, prompt=PROMPT + "x" * 5000)
    assert telling.last["prompt"].startswith(PROMPT) and len(telling.last["prompt"]) == 2000
    (file,) = (tmp_path / "telling").iterdir()
    assert "\x1b" not in file.read_text() and file.read_text().count("\n") == 1


def test_what_is_refused_is_a_line_too(tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    key = make_key()
    keys.write_text(f'- {{name: shop, sha256: "{fingerprint(key)}"}}\n')
    log = Log(tmp_path / "log", keys=str(keys))
    secret = "very-secret"
    for path, status, route in (
        ("/v1/images/edits", 401, "/v1/images/edits"),
        (f"/{secret}/../x", 401, "other"),
        (f"/{secret}" * 50, 401, "other"),
    ):
        assert log.http.post(path).status_code == status
        assert (log.last["status"], log.last["route"], log.last["client"]) == (status, route, None)
    headers = {"authorization": f"Bearer {key}"}
    log.http.get("/v1/jobs/0123", headers=headers)
    assert (log.last["route"], log.last["client"], log.last["status"]) == (
        "/v1/jobs/{id}", "shop", 404,
    )  # fmt: skip
    assert edit(log, headers, n="99").status_code == 400
    assert (log.last["status"], log.last["images"]) == (400, 0)
    files = {"image": picture()}
    assert log.http.post(
        "/v1/blueprints", files=files, data={"prompt": "x"}, headers=headers
    ).is_success
    assert (log.last["route"], log.last["images"]) == ("/v1/blueprints", 0)
    log.http.get("/livez")
    assert (log.last["route"], log.last["client"]) == ("/livez", None)
    assert secret not in json.dumps(log.lines()) and key not in json.dumps(log.lines())


@pytest.mark.parametrize(
    "id", ["x" * 129, "", "a b", "\x1b[31m", "a\tb", "é", '"}{"status":200'], ids=range(7)
)
def test_a_hostile_id_is_refused(id: str, log: Log) -> None:
    answer = log.http.get("/livez", headers={"x-request-id": id.encode("latin-1")})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "X-Request-ID"
    assert (log.last["request_id"], log.last["status"]) == (None, 400)
    assert id not in answer.text or not id


def test_the_client_s_id_is_the_request_s(log: Log) -> None:
    log.http.get("/livez", headers={"x-request-id": "shop-7:a/b=="})
    assert log.last["request_id"] == "shop-7:a/b=="


def test_what_fails_is_a_line(log: Log) -> None:
    log.server.painter.error = RuntimeError("broken")
    assert edit(log).status_code == 500
    assert (log.last["status"], log.last["complete"], log.last["images"]) == (500, True, 1)
    assert edit(log, stream="true").status_code == 200  # which says it in an event
    assert (log.last["status"], log.last["images"], log.last["painted_ms"]) == (200, 1, 0)


def test_gone_clients_have_a_number() -> None:
    counted: list[tuple[str, int]] = []

    class Counted:
        def request(self, route: str, status: int, seconds: float, account: Account) -> None:
            counted.append((route, status))

    async def gone(*_: Any) -> None:
        raise asyncio.CancelledError

    async def broken(*_: Any) -> None:
        raise ConnectionResetError

    async def half(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise OSError

    async def send(_: Any) -> None:
        pass

    scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
    for app, error in ((gone, asyncio.CancelledError), (broken, OSError), (half, OSError)):
        with pytest.raises(error):
            asyncio.run(Observed(app, None, Counted())(dict(scope), None, send))  # type: ignore[arg-type]
    assert counted == [("other", 499), ("other", 500), ("other", 200)]


def body_of(request: httpx.Request) -> tuple[dict[str, Any], bytes]:
    """A request as ASGI has it: its scope and its body."""
    scope = {
        "type": "http", "asgi": {"spec_version": "2.3"}, "http_version": "1.1", "scheme": "http",
        "method": request.method, "path": request.url.path, "query_string": b"", "root_path": "",
        "headers": [(name.lower(), value) for name, value in request.headers.raw],
    }  # fmt: skip
    return scope, request.read()


FORM = httpx.Request(
    "POST", "http://localhost/v1/images/edits",
    files={"image": picture()}, data={"prompt": PROMPT, "stream": "true"},
)  # fmt: skip
JSON = httpx.Request("POST", "http://localhost/v1/images/generations", json={"prompt": PROMPT})


def by_serve() -> dict[str, str]:
    """How Serve's replica says it where its proxy has given the request up."""
    raise TaskCancelledError


def by_asgi() -> dict[str, str]:
    return {"type": "http.disconnect"}


@pytest.mark.parametrize("how", [by_serve, by_asgi])
@pytest.mark.parametrize(
    ("request_", "share", "status"), [(FORM, 0.5, 499), (JSON, 0.5, 499), (FORM, 1, 200)]
)
def test_a_client_that_goes_early_is_a_line_and_nothing_else(
    how: Callable[[], dict[str, str]], request_: httpx.Request, share: float, status: int,
    log: Log, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    scope, body = body_of(request_)
    part = body[: int(share * len(body))]
    begun = asyncio.Event()
    given = [{"type": "http.request", "body": part, "more_body": share < 1}]

    async def receive() -> dict[str, Any]:
        if given:
            return given.pop()
        if share == 1:
            await begun.wait()  # it reads the first event of its stream
        return how()

    async def send(message: Any) -> None:
        if share == 1 and message["type"] == "http.response.body":
            begun.set()
            await asyncio.sleep(3600)  # nobody reads on

    asyncio.run(asyncio.wait_for(log.server.app(scope, receive, send), 20))
    (line,) = log.lines()
    assert (line["status"], line["complete"]) == (status, False)
    assert not caplog.records
    assert log.server.app.state.admission.pending.images == 0


def test_files_are_put_aside(tmp_path: Path) -> None:
    log = open_log(AccessLogConfig(to=str(tmp_path), max_megabytes=0.0005, keep=2))
    assert log is not None
    for number in range(100):
        log.write({"number": number, "more": "x" * 40})
    assert len(list(tmp_path.iterdir())) == 3
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= 1500


def test_it_is_off_and_a_text_says_where_to() -> None:
    assert ServingConfig(model="m").access_log is None and open_log(None) is None
    assert ServingConfig(model="m", access_log="stdout").access_log == AccessLogConfig()


def test_standard_output_takes_lines(capfd: pytest.CaptureFixture[str]) -> None:
    server = Server(access_log="stdout")
    server.http.get("/livez")
    assert json.loads(capfd.readouterr().out)["route"] == "/livez"
