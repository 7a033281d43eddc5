"""How soon a worker is ready to ask, beside very many stored answers on an S3 server (rclone's)."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from benchmarks.row import Row
from infra.storage import Store, open_store
from pipelines.calls.answers import Answers, answer_key, gather_earlier
from tests import rclone_server

ANSWERS = 200_000
PER_RANGE = 500
PER_OBJECT = 50  # those of about a second
TEXT = "The left half of the picture, where the red box stands beside the tree. " * 10


@contextmanager
def stored(by_range: bool) -> Iterator[Store]:
    """The output of a job, on a server that keeps objects as files."""
    with tempfile.TemporaryDirectory() as folder:
        answers = Path(folder, "served", "bucket", "job", "answers")
        for first in range(0, ANSWERS, PER_OBJECT):
            name = f"{first // PER_RANGE:05d}" if by_range else "."
            file = answers / name / f"{first:08d}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("".join(map(line, range(first, first + PER_OBJECT))))
        with rclone_server.running(Path(folder, "served")) as url:
            os.environ |= {
                "AWS_ACCESS_KEY_ID": rclone_server.ACCESS_KEY,
                "AWS_SECRET_ACCESS_KEY": rclone_server.SECRET_KEY,
            }
            yield open_store(f"s3://bucket/job?endpoint_override={url}")


def line(number: int) -> str:
    """An answer, as it is kept."""
    usage = {"input_tokens": 1000, "output_tokens": 200, "usd": 0.004, "seconds": 1.5}
    entry = {"key": key(number), "answer": TEXT, "record": f"r-{number}", "usage": usage}
    return json.dumps(entry) + "\n"


def key(number: int) -> str:
    """The key of an answer."""
    return answer_key("openai:m", str(number))


def ready() -> float:
    """Seconds until a worker has what was answered about its range."""
    with stored(by_range=True) as store:
        began = time.monotonic()
        answers = Answers(store, "00123")
        keys = [key(number) for number in range(123 * PER_RANGE, 124 * PER_RANGE)]
        found = answers.find(keys)
        seconds = time.monotonic() - began
    if len(found) != PER_RANGE:
        raise RuntimeError(f"{len(found)} of {PER_RANGE} answers were found")
    return seconds


def names() -> list[str]:
    """Of the ranges."""
    return [f"{number:05d}" for number in range(ANSWERS // PER_RANGE)]


@cache
def of_older_versions() -> tuple[float, float]:
    """Seconds for bringing them together, once; then until a worker has those of its range."""
    with stored(by_range=False) as store:
        began = time.monotonic()
        earlier = gather_earlier(store, names())
        gathered = time.monotonic()
        answers = Answers(store, "00123", earlier)
        answers.find([key(number) for number in range(123 * PER_RANGE, 123 * PER_RANGE + 64)])
        return gathered - began, time.monotonic() - gathered


BEFORE = 58.0  # of the same objects in one folder; an object an answer, 10,000 took 13 seconds
ROWS = (
    Row(
        "answers",
        f"seconds until a worker is ready beside {ANSWERS:,} answers",
        BEFORE,
        2,
        "less",
        ready,
    ),
    Row(
        "answers-earlier",
        "the same, with a first batch, where an older version kept them",
        BEFORE,
        2,
        "less",
        lambda: of_older_versions()[1],
    ),
)
