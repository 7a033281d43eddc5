"""Asynchronous jobs, with parts that need no Ray and a real object store."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from infra.storage import open_store
from serving import background
from serving.jobs import GenerateJob, Painted
from serving.protocol import Job
from serving.work import Work
from tests.serving.fakes import Method, Server, data_url, opened, picture


@pytest.fixture
def server(s3: str) -> Iterator[Server]:
    server = Server(object_store=s3)
    with server.http:  # one event loop for all requests
        yield server


def begin(server: Server, **fields: Any) -> Any:
    body = {"prompt": "x", **fields}
    return server.http.post("/v1/images/generations", params={"async": "true"}, json=body)


def job(server: Server, id: str) -> dict:
    answer = server.http.get(f"/v1/jobs/{id}")
    assert answer.status_code == 200, answer.text
    return answer.json()


def wait_for(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := condition()):
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)
    return found


def ended(server: Server, id: str) -> dict:
    return wait_for(lambda: (found := job(server, id))["status"] != "running" and found)


def never_done(server: Server) -> None:
    async def paint(job: GenerateJob) -> AsyncIterator[Painted]:
        server.painter.jobs.append(job)
        await asyncio.sleep(3600)
        yield Painted(b"", 1, 1, "edit2@cafe")

    server.painter.paint = Method(paint)


def test_a_job_is_answered_at_once_and_has_its_result_later(server: Server) -> None:
    answer = begin(server, n=2, seed=4)
    assert answer.status_code == 202, answer.text
    begun = answer.json()
    assert answer.headers["location"] == f"/v1/jobs/{begun['id']}"
    assert (begun["status"], begun["result"]) == ("running", None)
    done = ended(server, begun["id"])
    assert done["status"] == "succeeded"
    assert [item["seed"] for item in done["result"]["data"]] == [4, 5]
    assert opened(done["result"]["data"][0]["b64_json"]).size == (64, 64)
    wait_for(lambda: server.app.state.admission.pending.images == 0)


def test_edits_and_blueprints_are_put_off_too(server: Server) -> None:
    for route in ("images/edits", "blueprints"):
        files = {"image": ("a.png", picture())}
        answer = server.http.post(f"/v1/{route}?async=1", data={"prompt": "x"}, files=files)
        assert ended(server, answer.json()["id"])["status"] == "succeeded"


def test_a_job_that_fails_says_why_as_a_request_does(server: Server) -> None:
    refused = begin(server, size="9x9")  # what can be known at once is
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "size"
    server.painter.error = TimeoutError()
    done = ended(server, begin(server).json()["id"])
    assert done["status"] == "failed" and done["result"] is None
    assert "took too long" in done["error"]["message"]


def test_a_cancelled_job_frees_its_place(server: Server) -> None:
    never_done(server)
    id = begin(server).json()["id"]
    wait_for(lambda: server.painter.jobs)
    assert server.app.state.admission.pending.images == 1
    assert server.http.delete(f"/v1/jobs/{id}").json()["status"] == "cancelled"
    assert job(server, id)["status"] == "cancelled"
    wait_for(lambda: server.app.state.admission.pending.images == 0)
    assert server.http.delete(f"/v1/jobs/{id}").json()["status"] == "cancelled"


def test_any_replica_tells_of_a_job_and_cancels_it(
    server: Server, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LOOK_S", 0.05)
    never_done(server)
    id = begin(server).json()["id"]
    other = Server(object_store=s3)
    assert job(other, id)["status"] == "running"
    assert other.http.delete(f"/v1/jobs/{id}").status_code == 200
    assert ended(other, id)["status"] == "cancelled"


def test_a_job_whose_replica_died_is_lost_after_its_deadline(server: Server, s3: str) -> None:
    past = int(time.time()) - background.GRACE_S - 5
    dead = Job(id="0" * 32, created_at=past, deadline=past)
    kept = background.Kept(job=dead, fingerprint="", attempt="a")
    open_store(s3).write(f"jobs/{dead.id}.json", kept.model_dump_json().encode())
    found = job(server, dead.id)
    assert found["status"] == "failed" and found["error"]["code"] == "job_lost"


def test_a_full_server_takes_no_job(server: Server) -> None:
    with server.app.state.admission.admit(Work(images=32 - 1)):
        assert begin(server, n=2).status_code == 429
    assert server.app.state.admission.pending.images == 0


@pytest.mark.parametrize("id", ["0" * 32, "x", "../served", "0" * 32 + ".json"])
def test_an_unknown_job_is_not_found(server: Server, id: str) -> None:
    for answer in (server.http.get(f"/v1/jobs/{id}"), server.http.delete(f"/v1/jobs/{id}")):
        assert answer.status_code == 404 and "error" in answer.json()


def test_what_cannot_be_put_off_is_refused(server: Server) -> None:
    assert begin(server, stream=True).json()["error"]["param"] == "stream"
    assert begin(Server()).json()["error"]["param"] == "async"
    unclear = server.http.post("/v1/images/generations?async=perhaps", json={"prompt": "x"})
    assert unclear.status_code == 400 and unclear.json()["error"]["param"] == "async"
    files = {"image": ("a.png", picture())}
    form = server.http.post("/v1/images/edits?async=perhaps", data={"prompt": "x"}, files=files)
    assert form.status_code == 400 and form.json()["error"]["param"] == "async"


def test_a_store_that_refuses_begins_nothing(s3: str) -> None:
    server = Server(object_store=f"{s3}-gone")
    assert begin(server).status_code == 503
    assert server.app.state.admission.pending.images == 0 and not server.painter.jobs


def ask_once(server: Server, key: str = "a key", **fields: Any) -> Any:
    body = {"prompt": "x", **fields}
    headers = {"Idempotency-Key": key}
    return server.http.post("/v1/images/generations", headers=headers, json=body)


def test_the_same_key_gets_the_same_answer(server: Server, s3: str) -> None:
    first = ask_once(server)
    assert first.status_code == 200, first.text
    for asked in (server, Server(object_store=s3)):
        assert ask_once(asked).json() == first.json()
    assert len(server.painter.jobs) == 1
    assert ask_once(server, "another").json()["data"] != first.json()["data"]
    assert server.app.state.admission.pending.images == 0


def test_a_form_and_json_with_one_key_are_one_request(server: Server) -> None:
    headers = {"Idempotency-Key": "k"}
    files = {"image": ("a.png", picture())}
    form = server.http.post("/v1/images/edits", data={"prompt": "x"}, files=files, headers=headers)
    body = {"prompt": "x", "images": [data_url(picture())]}
    json = server.http.post("/v1/images/edits", json=body, headers=headers)
    assert form.status_code == 200 and json.json() == form.json()
    other = {**body, "images": [data_url(picture(colour=(0, 0, 0)))]}
    refused = server.http.post("/v1/images/edits", json=other, headers=headers)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "Idempotency-Key"


def test_an_error_is_the_answer_of_its_key_too(server: Server) -> None:
    server.painter.error = TimeoutError()
    first = ask_once(server)
    server.painter.error = None
    again = ask_once(server)
    assert first.status_code == again.status_code == 504
    assert first.json() == again.json()
    assert again.headers["x-should-retry"] == "false"


def test_who_asks_again_waits_for_the_first(
    server: Server, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LOOK_S", 0.02)
    paint, may_go = server.painter.paint, threading.Event()

    async def slow(job: GenerateJob) -> AsyncIterator[Any]:
        await asyncio.to_thread(may_go.wait, 20)
        async for piece in paint.remote(job):
            yield piece

    server.painter.paint = Method(slow)
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(ask_once, server)
        wait_for(lambda: server.app.state.admission.pending.images)
        wait_for(lambda: open_store(s3).list("jobs"))
        again = pool.submit(ask_once, Server(object_store=s3))
        time.sleep(0.1)
        assert not again.done()
        may_go.set()
        assert first.result().json() == again.result().json()
    assert len(server.painter.jobs) == 1


def test_a_key_that_cannot_be_kept_is_refused(server: Server) -> None:
    for refused, param in (
        (ask_once(Server()), "Idempotency-Key"),
        (ask_once(server, stream=True), "stream"),
        (ask_once(server, "k" * 256), "Idempotency-Key"),
    ):
        assert refused.status_code == 400 and refused.json()["error"]["param"] == param
