"""Whole jobs whose designer is down, costly, slow or talks nonsense: nothing lost or paid twice."""

from __future__ import annotations

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from dim.blueprint import Blueprint
from dim.designers import CallOptions
from dim.designers.base import BreakerOptions
from dim.errors import CallsStopped
from infra.storage import Store, open_store
from pipelines import edit, ingest, job
from pipelines.calls import bill
from pipelines.calls.answers import read_entries
from pipelines.edit import EditConfig
from pipelines.filters import PairRules
from pipelines.ingest import IngestConfig
from tests.chat_server import ChatServer, Response, completion, text_of
from tests.pipelines.samples import write_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 24
PLAN = Blueprint("Add a red box.", "A field.", "- grass", "The left.", "A field with a box.")
ANSWER = completion(f"Alignment: aligned\n\n{PLAN.render()}", tokens=(1000, 100))
PRICED = {"input_price": 100.0, "output_price": 0.0}  # ten cents an answer


@pytest.fixture(scope="module")
def raw(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good pairs as raw shards."""
    folder = tmp_path_factory.mktemp("calls")
    pairs = write_pairs(folder, PAIRS)
    ingest.run(IngestConfig(pairs=str(pairs), out=str(folder / "raw")))
    return folder / "raw"


def config(raw: Path, out: Path, server: ChatServer, **calls: Any) -> EditConfig:
    options = {"retries": 0, "timeout_s": 20, "in_flight": 4, **calls}
    return EditConfig(
        raw=str(raw),
        out=str(out),
        designer=f"openai:m@{server.url}",
        filters=PairRules(min_side=32),
        calls=CallOptions(**options),
        batch_size=4,
        rows_per_file=8,
    )


def number(request: dict[str, Any]) -> int:
    """Which pair a request is about."""
    return int(text_of(request).partition("red box number ")[2].partition(".")[0])


def answered(out: Path) -> int:
    return sum(1 for _ in read_entries(open_store(str(out))))


def test_a_job_stops_at_its_budget_and_goes_on_with_a_larger_one(
    raw: Path, tmp_path: Path, chat_server: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat_server.respond = lambda request: ANSWER
    out = tmp_path / "edit"
    from_receipts: list[bill.Sums] = []

    def spy(store: Store, known: Mapping[str, bill.Sums]) -> dict[str, float]:
        from_receipts.extend(known.values())
        return bill.read_costs(store, known)

    monkeypatch.setattr(job, "read_costs", spy)
    with pytest.raises(CallsStopped, match=r"budget of \$1.00 is spent.*larger calls.budget") as e:
        edit.run(config(raw, out, chat_server, budget=1.0, **PRICED))
    assert "\n" not in str(e.value) and not (out / "manifest.json").exists()
    paid = len(chat_server.requests)
    assert answered(out) == paid and 8 <= paid <= 14

    told: list[tuple[int, int, float]] = []
    manifest = edit.run(
        config(raw, out, chat_server, budget=100.0, **PRICED),
        on_progress=lambda *progress: told.append(progress),
    )
    assert len(chat_server.requests) == PAIRS  # nothing was paid for twice
    assert manifest.counts.kept == manifest.counts.input == PAIRS
    assert manifest.cost == {
        "requests": PAIRS,
        "input_tokens": 1000 * PAIRS,
        "output_tokens": 100 * PAIRS,
        "usd": pytest.approx(0.1 * PAIRS),
    }
    assert told[-1][0] == told[-1][1] and told[-1][2] == pytest.approx(0.1 * PAIRS)
    assert [usd for *_, usd in told] == sorted(usd for *_, usd in told)
    assert sum(sums["requests"] for sums in from_receipts) == PAIRS
    lines = list(csv.DictReader((out / "bill.csv").read_text().splitlines()))
    assert {line["id"] for line in lines} == {f"pair-{n}" for n in range(PAIRS)}
    assert all(float(line["usd"]) == pytest.approx(0.1) for line in lines)


def test_a_job_whose_designer_goes_down_loses_nothing(
    raw: Path, tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: (
        ANSWER if len(chat_server.requests) <= 9 else Response(b"out of memory", 500)
    )
    breaker = BreakerOptions(failures=3, pause_s=0.1, down_s=0.5)
    out = tmp_path / "edit"
    down = config(raw, out, chat_server, retries=50, breaker=breaker)
    with pytest.raises(CallsStopped, match="has been down for .*out of memory") as stopped:
        edit.run(down)
    assert "\n" not in str(stopped.value)
    assert answered(out) == 9 and len(chat_server.requests) < 9 + PAIRS

    chat_server.requests.clear()
    chat_server.respond = lambda request: ANSWER
    manifest = edit.run(down)
    assert manifest.counts.kept == PAIRS
    assert len(chat_server.requests) == PAIRS - 9


def test_every_kind_of_nonsense_is_somebodys_failure_and_nobody_elses(
    raw: Path, tmp_path: Path, chat_server: ChatServer
) -> None:
    release = threading.Event()
    nonsense: dict[int, Callable[[], Response]] = {
        0: lambda: Response(b"{}", 500),
        2: lambda: Response(b"<html>Bad gateway</html>", 502, "text/html"),
        4: lambda: Response(b"<html>Log in</html>", 200, "text/html"),
        6: lambda: Response(b""),
        8: lambda: Response(ANSWER.body[: len(ANSWER.body) // 2]),
        10: lambda: completion(""),
        12: lambda: completion(PLAN.render()[:20], "length"),
        14: lambda: completion(None, refusal="I cannot"),
        16: lambda: completion(str(release.wait(20))),
        18: lambda: Response(b"bad request", 400),
    }
    at_first = {5: 429, 7: 503, 9: 500}
    seen: Counter[int] = Counter()

    def respond(request: dict[str, Any]) -> Response:
        asked = number(request)
        seen[asked] += 1
        if asked in at_first and seen[asked] == 1:
            return Response(b"later", at_first[asked], headers={"Retry-After-Ms": "20"})
        return nonsense[asked]() if asked in nonsense else ANSWER

    chat_server.respond = respond
    out = tmp_path / "edit"
    manifest = edit.run(config(raw, out, chat_server, retries=1, timeout_s=2, in_flight=2))
    release.set()
    counts = manifest.counts
    assert counts.add_up() and counts.input == PAIRS
    assert (counts.failed, counts.kept) == (len(nonsense), PAIRS - len(nonsense))
    errors = _errors(out)
    for place, complaint in {
        0: "HTTP 500",
        2: "HTTP 502: <html>Bad gateway",
        4: "did not answer with a chat completion but with <html>Log in",
        6: "with nothing",
        8: "cannot be read",
        10: "answered nothing",
        12: "cut off",
        14: "refused: I cannot",
        16: "no answer in time",
        18: "HTTP 400: bad request",
    }.items():
        assert complaint in errors[f"pair-{place}"]

    chat_server.requests.clear()
    chat_server.respond = lambda request: ANSWER
    again = edit.run(config(raw, out, chat_server), retry_failed=True)
    assert again.counts.kept == PAIRS
    assert {number(request) for request in chat_server.requests} == set(nonsense)
    assert again.cost is not None
    assert again.cost["requests"] == PAIRS + 3  # what was cut off, refused or empty was paid too


def _errors(out: Path) -> dict[str, str]:
    import pyarrow.parquet as pq

    rows = pq.read_table(out / "failed").to_pylist()
    return {row["id"]: row["error"] for row in rows}


def test_a_killed_driver_pays_for_nothing_twice_and_makes_the_same_output(
    raw: Path, tmp_path: Path, chat_server: ChatServer
) -> None:
    def respond(request: dict[str, Any]) -> Response:
        time.sleep(0.1)
        if number(request) == 3:
            return completion(None, tokens=(1000, 5), refusal="I cannot")
        return ANSWER

    killed, refused, after = threading.Event(), threading.Event(), itertools.count()

    def hold(request: dict[str, Any]) -> Response:
        """Answer a few more after the refusal, so that the job cannot end before it is killed."""
        if refused.is_set() and next(after) >= 6:
            killed.wait(200)
            return Response(b"nobody listens", 400)
        answer = respond(request)
        if number(request) == 3:
            refused.set()
        return answer

    chat_server.respond = respond
    expected = edit.run(config(raw, tmp_path / "undisturbed", chat_server, **PRICED))
    chat_server.respond = hold
    out = tmp_path / "edit"
    settings = config(raw, out, chat_server, **PRICED)
    file = tmp_path / "edit.yaml"
    file.write_text(settings.model_dump_json())
    import ray

    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "pipelines.edit", "--config", str(file), "--raw", str(raw)),
            *("--designer", settings.designer, "--out", str(out)),
        ],
        cwd=ROOT,
        env={**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and process.poll() is None and not _has(out, "pair-3", 5):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    said, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL, said.decode()
    killed.set()
    time.sleep(2)  # the cluster notices, and ends the workers
    kept = [entry.record for entry in read_entries(open_store(str(out)))]
    assert 5 <= len(kept) < PAIRS

    chat_server.respond = respond
    chat_server.requests.clear()
    manifest = edit.run(settings)
    asked = Counter(f"pair-{number(request)}" for request in chat_server.requests)
    assert set(asked) == {f"pair-{n}" for n in range(PAIRS)} - set(kept)
    assert set(asked.values()) == {1}
    same = {"files", "counts", "cost"}
    assert manifest.model_dump(include=same) == expected.model_dump(include=same)


def _has(out: Path, record: str, least: int) -> bool:
    """Whether there are so many answers, one of them this record's."""
    found = [
        json.loads(line)["record"]
        for path in (out / "answers").rglob("*.*")
        for line in path.read_text().splitlines(keepends=True)
        if line.endswith("\n")
    ]
    return record in found and len(found) >= least
