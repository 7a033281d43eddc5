"""``dim batch``: OpenAI's batch layout in and out, and nothing done twice however it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from dim import cli
from dim.errors import InputError
from infra.ports import free_port
from infra.storage import open_store
from serving import batch as batches
from serving.batch import BatchStopped, run
from serving.batch import Server as Asked
from serving.batch_files import read_input
from serving.jobs import GenerateJob
from tests.serving.fakes import Method, Server, data_url, picture

ROOT = Path(__file__).resolve().parents[2]
GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """``app`` on a port of its own."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)


def line(name: str, url: str = GENERATIONS, **body: Any) -> dict[str, Any]:
    body = {"prompt": name, **body}
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def write(path: Path, *lines: Any) -> str:
    path.write_text("".join(f"{json.dumps(each)}\n" for each in lines))
    return str(path)


def read(out: str, name: str) -> list[dict[str, Any]]:
    return [json.loads(each) for each in open_store(out).read(name).decode().splitlines()]


def painted(server: Server) -> Counter[str]:
    return Counter(getattr(job, "prompt", "edit") for job in server.painter.jobs)


def test_answers_and_errors_are_files_of_openai_s_layout(s3: str, tmp_path: Path) -> None:
    server = Server(object_store=f"{s3}/server")
    source = write(
        tmp_path / "in.jsonl",
        line("one", seed=1),
        line("edit", EDITS, images=[data_url(picture())], designer="none", n=2),
        line("wrong", size="9x9"),
        line("two", seed=2, service_tier="default"),
        line("plan", "/v1/blueprints", images=[data_url(picture())]),
    )
    out = f"{s3}/batch"
    with listening(server.app) as url:
        state = run(source, out, Asked(url), 3)
        assert (state.status, state.request_counts.model_dump()) == (
            "completed", {"total": 5, "completed": 4, "failed": 1},
        )  # fmt: skip
        assert state.endpoint is None and state.error_file_id == f"{out}/errors.jsonl"
        answers = read(out, "output.jsonl")
        assert [each["custom_id"] for each in answers] == ["one", "edit", "two", "plan"]
        assert all(each["error"] is None and each["id"] for each in answers)
        first = answers[0]["response"]
        assert (first["status_code"], first["body"]["data"][0]["seed"]) == (200, 1)
        assert first["request_id"]
        assert len(answers[1]["response"]["body"]["data"]) == 2
        (error,) = read(out, "errors.jsonl")
        assert error["custom_id"] == "wrong" and error["response"]["status_code"] == 400
        assert error["response"]["body"]["error"]["param"] == "size"
        names = {name for name, _ in open_store(out).list()}
        assert names == {"batch.json", "output.jsonl", "errors.jsonl"}
        before = painted(server)
        assert before == {"one": 1, "two": 1, "edit": 2}
        # Behind those that somebody waits for, but for what says otherwise.
        jobs = {getattr(job, "prompt", "edit"): job.batch for job in server.painter.jobs}
        assert jobs == {"one": True, "edit": True, "two": False}
        assert run(source, out, Asked(url), 3) == state  # it is done
        assert painted(server) == before


def test_killed_and_run_again_nothing_is_painted_twice(s3: str, tmp_path: Path) -> None:
    server = Server(object_store=f"{s3}/server", max_pending=10)
    paint = server.painter._paint

    async def slow(job: GenerateJob) -> AsyncIterator[Any]:
        import asyncio

        await asyncio.sleep(0.15)
        async for piece in paint(job):
            yield piece

    server.painter.paint = Method(slow)
    names = [f"r{number}" for number in range(16)]
    source = write(tmp_path / "in.jsonl", *(line(name) for name in names))
    out = str(tmp_path / "out")
    with listening(server.app) as url:
        command = [sys.executable, "-m", "serving.batch", source, "--out", out, "--url", url,
                   "--concurrency", "4"]  # fmt: skip
        begun = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
        results = tmp_path / "out" / "results"
        while begun.poll() is None and len(list(results.glob("*.json"))) < 4:
            time.sleep(0.02)
        begun.send_signal(signal.SIGKILL)
        assert begun.wait() == -signal.SIGKILL
        state = json.loads((tmp_path / "out" / "batch.json").read_text())
        assert state["status"] == "in_progress" and not (tmp_path / "out/output.jsonl").exists()
        with pytest.raises(SystemExit) as ended:
            cli.main(["batch", source, "--out", out, "--url", f"{url}/v1"])
        assert not ended.value.code
    assert painted(server) == dict.fromkeys(names, 1)
    assert [each["custom_id"] for each in read(out, "output.jsonl")] == names
    assert not results.exists() and not (tmp_path / "out" / "errors.jsonl").exists()


class Script:
    """A server that answers as it is told: (status, headers), the last one for ever."""

    def __init__(self, *answers: tuple[int, dict[str, str]]) -> None:
        self._answers = list(answers)
        self.keys: list[str | None] = []
        self.authorization: set[str | None] = set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        while (await receive()).get("more_body"):
            pass
        headers = {key.decode(): value.decode() for key, value in scope["headers"]}
        self.keys.append(headers.get("idempotency-key"))
        self.authorization.add(headers.get("authorization"))
        status, more = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
        body = {"data": []} if status == 200 else {"error": {"message": f"said {status}", **more}}
        said = [(key.encode(), value.encode()) for key, value in more.items()]
        await send({"type": "http.response.start", "status": status, "headers": said})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def do(script: Script, tmp_path: Path, *names: str, **how: Any) -> Any:
    source = write(tmp_path / "in.jsonl", *(line(name) for name in names or ("a",)))
    with listening(script) as url:
        return run(source, str(tmp_path / "out"), Asked(url, **how), 1)


def test_a_busy_server_is_asked_again_when_it_says_so(tmp_path: Path) -> None:
    script = Script((429, {"retry-after": "0"}), (503, {"retry-after": "0"}), (200, {}))
    assert do(script, tmp_path).request_counts.completed == 1
    assert len(script.keys) == 3 and len(set(script.keys)) == 1  # nothing was begun: one key
    assert script.authorization == {None}


def test_what_failed_is_tried_under_another_key(tmp_path: Path) -> None:
    script = Script((500, {}), (504, {}), (200, {}))
    assert do(script, tmp_path, key="secret").request_counts.completed == 1
    assert len(set(script.keys)) == 3
    assert script.authorization == {"Bearer secret"}


@pytest.mark.parametrize(("status", "times"), [(500, 2), (502, 1), (400, 1), (404, 1)])
def test_what_cannot_be_done_is_an_error_and_the_rest_goes_on(
    status: int, times: int, tmp_path: Path
) -> None:
    script = Script(*[(status, {})] * times, (200, {}))
    state = do(script, tmp_path, "a", "b", attempts=times)
    assert (state.request_counts.completed, state.request_counts.failed) == (1, 1)
    (error,) = read(str(tmp_path / "out"), "errors.jsonl")
    assert (error["custom_id"], error["response"]["status_code"]) == ("a", status)


@pytest.mark.parametrize(
    ("answer", "said"),
    [((401, {}), "said 401"), ((403, {}), "said 403"), ((503, {"retry-after": "0"}), "was busy")],
)
def test_a_server_that_lets_nobody_in_stops_it(answer: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(BatchStopped, match=said):
        do(Script((200, {}), answer), tmp_path, "a", "b", "c", patience_s=0.2)
    assert len(list((tmp_path / "out/results").iterdir())) == 1
    assert do(Script((200, {})), tmp_path, "a", "b", "c").request_counts.completed == 3


def test_a_server_that_is_not_there_stops_it(tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", line("a"))
    with pytest.raises(BatchStopped, match="cannot be reached"):
        run(source, str(tmp_path / "out"), Asked("http://127.0.0.1:9", patience_s=0.1), 2)


def test_no_answer_in_time_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Script):
        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            import asyncio

            if scope["type"] == "http":
                self.keys.append("x")
                await asyncio.sleep(1)

    silent = Silent((200, {}))
    assert do(silent, tmp_path, timeout_s=0.1, attempts=2).request_counts.failed == 1
    (error,) = read(str(tmp_path / "out"), "errors.jsonl")
    assert (error["response"], error["error"]["code"]) == (None, "timeout")
    assert len(silent.keys) == 2


def test_a_server_without_a_store_is_asked_without_keys(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server = Server()
    source = write(tmp_path / "in.jsonl", line("a"), line("b"))
    with listening(server.app) as url:
        assert run(source, str(tmp_path / "out"), Asked(url), 1).request_counts.completed == 2
    assert "keeps no answers" in capsys.readouterr().err
    assert painted(server) == {"a": 1, "b": 1}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no request"),
        ("{", "line 1: Invalid JSON"),
        ("[1]", "line 1: Input should be an object"),
        (json.dumps({**line("a"), "method": "GET"}), "line 1: method: Input should be 'POST'"),
        (json.dumps(line("a", "/v1/keys")), "line 1: url: Input should be '/v1/images/edits'"),
        (json.dumps(line("a", "http://evil.example/v1/images/edits")), "line 1: url: Input"),
        (json.dumps({**line("a"), "more": 1}), "line 1: more: Extra inputs"),
        (json.dumps(line("")), "line 1: custom_id: String should have at least 1"),
        (f"{json.dumps(line('a'))}\n\n{json.dumps(line('a'))}", "line 3: .*'a' is that of line 1"),
    ],
)
def test_a_wrong_input_is_said_before_anything_is_asked(
    text: str, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "in.jsonl"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        run(str(file), str(tmp_path / "out"), Asked("http://127.0.0.1:9"), 1)
    assert not (tmp_path / "out").exists()


def test_a_long_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.batch_files._MOST_LINE", 100)
    file = write(tmp_path / "in.jsonl", line("a"), line("x" * 200))
    with pytest.raises(InputError, match="line 2 is over 100 bytes"):
        read_input(file)


def test_another_input_or_folder_is_refused(tmp_path: Path) -> None:
    do(Script((200, {})), tmp_path, "a")
    with pytest.raises(InputError, match="is the batch of another input"):
        do(Script((200, {})), tmp_path, "a", "b")
    (tmp_path / "out/batch.json").write_text("{}")
    with pytest.raises(batches.DimError, match=r"batch\.json is no batch"):
        do(Script((200, {})), tmp_path, "a")
    with pytest.raises(SystemExit) as ended:
        cli.main(["batch", "in.jsonl", "--out", str(tmp_path), "--url", "file:///etc"])
    assert ended.value.code == 1
