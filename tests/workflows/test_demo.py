"""The demo at a fraction of its size, from a wheel in an empty folder: steps, report, ``curl``."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.evaluate import Evaluation
from pipelines.stages.paint import PAINTED
from tests.wheel import environment
from workflows.demo import choose_example

SMALL = [
    "pairs=40",
    "images=24",
    "held_out=8",
    *(
        f"steps.{stage}.with.{setting}"
        for stage in ("t2i", "edit1", "edit2")
        for setting in ("steps=4", "batch_size=8", "checkpoint_every=2", "warmup_steps=1")
    ),
]


@pytest.fixture(scope="module")
def demo(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """What the demo wrote and printed; its server is stopped afterwards."""
    folder = tmp_path_factory.mktemp("empty")
    out = folder / "runs" / "demo"
    env = {key: value for key, value in environment().items() if not key.startswith("AWS_")}
    try:
        done = subprocess.run(
            [installed / "dim", "demo", *SMALL],
            cwd=folder, env=env, capture_output=True, text=True, timeout=480,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        yield out, done.stdout
    finally:
        for process in servers_of(out):
            process.send_signal(signal.SIGTERM)


def servers_of(out: Path) -> list[psutil.Process]:
    """The servers that a demo in ``out`` has left running."""
    found = psutil.process_iter(["cmdline"])
    return [p for p in found if f"{out}/" in " ".join(p.info["cmdline"] or [])]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_it_says_where_everything_is(demo: tuple[Path, str]) -> None:
    out, printed = demo
    assert (out / "data" / "pairs" / "manifest.json").is_file()
    assert (out / "training" / "edit2" / "model" / "dim.json").is_file()
    assert (out / "mlflow.db").is_file()
    for name in ("shards", "MLflow UI", "checkpoint", "model", "report", "server"):
        assert re.search(rf"^{name} ", printed, re.MULTILINE)
    stop = re.search(r"kill (\d+)", printed)
    assert stop is not None
    assert [process.pid for process in servers_of(out)] == [int(stop.group(1))]


@pytest.mark.slow
def test_its_page_is_there_from_the_beginning_and_moves_to_what_was_trained(
    demo: tuple[Path, str],
) -> None:
    out, printed = demo
    url = json.loads((out / "serving" / "page" / "server.json").read_text())["url"]
    assert f"page: open {url}/ in a browser" in printed
    assert printed.index("page: open") < printed.index("raw-pairs: begins")
    assert served_by(printed).startswith("edit2@") and f"serve: {url}/: dim serves" in printed
    (server,) = servers_of(out)
    replicas = [p for p in server.children(recursive=True) if "ServeReplica" in p.name()]
    assert replicas and {p.nice() for p in replicas} == {server.nice()}  # training waits for them


def served_by(printed: str) -> str:
    """The model that the demo's server was moved to."""
    moved = re.search(r"^serve: \S+/: dim serves (\S+)", printed, re.MULTILINE)
    assert moved is not None
    return moved[1]


@pytest.mark.slow
def test_it_ends_with_a_page_to_open(demo: tuple[Path, str]) -> None:
    opened = re.fullmatch(r"Or open this page: (http://\S+/)", demo[1].rstrip().splitlines()[-1])
    assert opened is not None
    with urllib.request.urlopen(opened[1], timeout=30) as page:
        assert b"<title>Draw-In-Mind</title>" in page.read()


@pytest.mark.slow
def test_the_report_is_one_page_with_its_pictures_inside(demo: tuple[Path, str]) -> None:
    page = (demo[0] / "report.html").read_text()
    assert page.count("<img") == 3 * 8
    assert "5. Edited Image Imagination:" in page
    assert page.count("% strictly)") >= 3 and "validation strict" in page
    assert not re.search(r'(?:src|href)="(?!data:)', page)


@pytest.mark.slow
def test_the_printed_curl_edits_an_image(demo: tuple[Path, str]) -> None:
    out, printed = demo
    command = next(line for line in printed.splitlines() if line.startswith("curl "))
    # The miniature training may leave a designer that stumbles over this image; the oracle cannot.
    command = command.replace(" -F prompt=", " -F designer=oracle -F prompt=", 1)
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1. Edit Instruction:")
    edited = Image.open(out / "example-edited.png")
    assert edited.size == (64, 64)
    assert served_by(printed) in str(edited.info)  # it says what it was painted by


def test_the_example_is_an_edit_that_came_out_right() -> None:
    def painted(name: str, way: str, exact: bool, referential: bool = False) -> dict[str, object]:
        row = {"id": name, "way": way, "exact": exact, "referential": referential}
        return {**row, "designed_right": exact}

    rows = [
        painted("a", "blueprint", True),
        painted("b", "self", False),
        painted("c", "self", True, referential=True),
        painted("d", "self", True),
    ]
    chosen, said = choose_example(Evaluation(pa.Table.from_pylist(rows, PAINTED)))
    assert chosen["id"] == "d" and "50% of direct edits" in said and said.endswith("this one did")
    chosen, said = choose_example(Evaluation(pa.Table.from_pylist(rows[:2], PAINTED)))
    assert chosen["id"] == "a" and said.endswith("0% of direct edits come out exactly")
