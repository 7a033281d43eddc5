"""The same work through others' data tools, each in its own environment, and the same kill.

    python -m benchmarks.peers                        # all of them (an hour on two cores)
    python -m benchmarks.peers --peers daft --pictures 200 --questions 300   # a minute of one
    python -m benchmarks.peers --no-kills --pictures 1000 --questions 1000   # speeds alone
    python -m benchmarks.peers --peers nemo_curator --pictures 0   # the calls alone

The filter work: decode a picture, look at its shorter side and at its aspect, take a perceptual
hash, and write what is left. A share of the pictures is too small, too long or cut off. The call
work: a question about every record to a local server that answers after a fixed time. A runner
(``with_PEER.py``) does both as the tool's documentation says, and resumes as it can.

Told for each: the lines of its runner; seconds to bring the input into its own form; pictures a
second and core, and answers a second (while the tool works; what it takes to start is told apart);
and the peak of what its processes hold, with what they share counted once. Then the call work is
run again, its first process is ended by SIGKILL when half of the questions have been asked,
whatever it started ends with it, and the same command is run once more, for five minutes at most:
records lost and doubled in the end, and questions that were asked twice.

Environments are made under ``--envs`` by ``venv`` and pip from ``requirements/``; a peer that does
not install or run is left out, with the reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq

from benchmarks.data_calls import Server, running
from benchmarks.peers.inputs import make_inputs

HERE = Path(__file__).parent
PEERS = ("dim", "datasets", "daft", "distilabel", "data_juicer", "nemo_curator")
OURS = "dim"
HEAD = """\
| | lines | prepared, s | pictures/s a core | answers/s | start, s | peak MiB, filter | peak MiB, \
calls | kept wrongly | killed: lost | doubled | asked again |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""
MIB = 1 << 20
_POLL_S = 0.1
_LOOK_S = 0.5  # at the memory of many processes, which takes time that they lack
_ENDS_WITHIN_S = 15.0
_PATIENCE_S = 1200.0
_RERUN_S = 300.0


@dataclass(frozen=True)
class Ran:
    """A job that came to its end: its seconds at work and in all, and bytes at its peak."""

    seconds: float
    whole: float
    peak: int


class PeerError(Exception):
    """A peer does not install, or its job failed."""


def main() -> int:
    """Measure them one after the other; returns the exit status."""
    options = _options()
    with tempfile.TemporaryDirectory(dir=options.folder) as name, running(options.latency) as asked:
        folder = Path(name)
        good = make_inputs(folder / "inputs", options.pictures, options.questions, options.side)
        print(f"{options.processes} cores; {len(good)} of {options.pictures} pictures are good;")
        ideal = options.in_flight / options.latency
        print(f"at most {ideal:.0f} answers a second\n\n{HEAD}", flush=True)
        for peer in options.peers:
            try:
                print(_row(peer, folder, good, asked, options), flush=True)
            except PeerError as error:
                print(f"| {peer} | left out: {error} |", flush=True)
    return 0


def _row(
    peer: str, folder: Path, good: set[str], asked: Server, options: argparse.Namespace
) -> str:
    python, version = _environment(peer, options.envs)
    inputs = folder / "inputs"
    began = time.perf_counter()
    if _start(python, peer, "prepare", inputs, folder / "prepared", 0).wait():
        raise PeerError(f"prepare: {_last_line(folder / 'prepared')}")
    prepared = time.perf_counter() - began

    def out(name: str) -> Path:
        shutil.rmtree(folder / name, ignore_errors=True)
        (folder / name).mkdir()
        return folder / name

    pace, peak, wrongly = "", "", ""
    if options.pictures:
        filtered = _run(python, peer, "filter", inputs, out("filtered"), options.processes)
        # A row without a hash is easily dropped, where a peer's function could not do that itself.
        kept = {row["id"] for row in _rows(folder / "filtered") if row.get("hash", 0) is not None}
        if lacking := good - kept:
            raise PeerError(f"{len(lacking)} good pictures are not kept")
        pace = f"{options.pictures / filtered.seconds / options.processes:.0f}"
        peak, wrongly = f"{filtered.peak / MIB:.0f}", str(len(kept - good))
    asked.times()
    arguments = (options.in_flight, asked.url)
    called = _run(python, peer, "ask", inputs, out("called"), *arguments)
    if len(asked.times()) < options.questions:
        raise PeerError("not every question reached the server")
    killed: tuple[object, ...] = ("", "", "")
    if options.kills:
        killed = _killed(
            lambda: _start(python, peer, "ask", inputs, folder / "killed", *arguments),
            out("killed"),
            asked,
            options.questions,
        )
    cells = [
        f"{peer} {version}",
        _lines(peer),
        f"{prepared:.0f}",
        pace,
        f"{options.questions / called.seconds:.0f}",
        f"{called.whole - called.seconds:.0f}",
        peak,
        f"{called.peak / MIB:.0f}",
        wrongly,
        *killed,
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _killed(
    start: Callable[[], subprocess.Popen[bytes]], out: Path, asked: Server, questions: int
) -> tuple[int, int, int]:
    """Records lost and doubled, and questions asked again, after a kill at half of the work."""
    asked.times()
    process, reached = start(), 0
    while reached < questions / 2:
        time.sleep(_POLL_S)
        reached += len(asked.times())
        if process.poll() is not None:
            raise PeerError("it was done before it was killed")
    started = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, left = psutil.wait_procs(started, timeout=_ENDS_WITHIN_S)
    _end(left)  # as the end of the machine would
    again = start()
    try:
        if again.wait(_RERUN_S):
            raise PeerError(f"it did not run again after a kill: {_last_line(out)}")
    except subprocess.TimeoutExpired:  # what it has not written by now is lost
        _end([*psutil.Process(again.pid).children(recursive=True), psutil.Process(again.pid)])
    reached += len(asked.times())
    rows = Counter(row["id"] for row in _rows(out) if row.get("answer") or row.get("caption"))
    return questions - len(rows), rows.total() - len(rows), reached - questions


def _run(python: Path, peer: str, what: str, inputs: Path, out: Path, *arguments: object) -> Ran:
    began = time.perf_counter()
    process = _start(python, peer, what, inputs, out, *arguments)
    seen: set[psutil.Process] = set()
    peak, done = [0], threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peak, seen, done))
    watcher.start()
    try:
        status = process.wait(_PATIENCE_S)
        whole = time.perf_counter() - began
    except subprocess.TimeoutExpired:
        _end([*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)])
        raise PeerError(f"{what}: not done after {_PATIENCE_S:.0f} s") from None
    finally:
        done.set()
        watcher.join()
        _, left = psutil.wait_procs(seen, timeout=_ENDS_WITHIN_S)
        _end(left)  # so that it does not disturb who comes next
    if status:
        raise PeerError(f"{what}: {_last_line(out)}")
    said = out.with_suffix(".log").read_text().splitlines()
    seconds = next(json.loads(line)["seconds"] for line in reversed(said) if '"seconds"' in line)
    return Ran(seconds, whole, peak[0])


def _end(processes: list[psutil.Process]) -> None:
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes)


def _last_line(out: Path) -> str:
    """The last that a job said, without what would end a cell of a table."""
    said = out.with_suffix(".log").read_text().strip().splitlines()
    return said[-1][:160].replace("|", "/") if said else "it said nothing"


def _start(
    python: Path, peer: str, what: str, inputs: Path, out: Path, *arguments: object
) -> subprocess.Popen[bytes]:
    command = [python, HERE / "run.py", peer, what, inputs, out, *map(str, arguments)]
    environment = {
        **os.environ,
        "PATH": f"{python.parent}:{os.environ['PATH']}",  # of what it starts itself
        "PYTHONPATH": str(HERE.parents[1]) if peer == OURS else "",
    }
    with out.with_suffix(".log").open("w") as log:
        return subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def _watch(pid: int, peak: list[int], seen: set[psutil.Process], done: threading.Event) -> None:
    """Keep the most that a process and its descendants held, and who these were."""
    while not done.wait(_LOOK_S):
        try:
            root = psutil.Process(pid)
            there = [root, *root.children(recursive=True)]
        except psutil.Error:
            continue
        seen.update(there)
        peak[0] = max(peak[0], sum(map(_share, there)))


def _share(process: psutil.Process) -> int:
    """Its memory; of what several share, such as Ray's object store, its part."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:  # gone meanwhile
        return 0


def _rows(out: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for path in (out / "data").rglob("*.parquet"):
        wanted = {"id", "hash", "answer", "caption"} & set(pq.read_schema(path).names)
        rows += pq.read_table(path, columns=sorted(wanted)).to_pylist()
    for path in (out / "data").glob("part.jsonl"):
        rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def _environment(peer: str, envs: Path) -> tuple[Path, str]:
    """The peer's Python, and its version; made where it is not there yet."""
    if peer == OURS:
        return Path(sys.executable), ""
    home, wanted = envs / peer, HERE / "requirements" / f"{peer}.txt"
    python, made = home / "bin/python", home / wanted.name
    if not (made.is_file() and made.read_text() == wanted.read_text()):
        venv.create(home, with_pip=True)
        pip = [str(python), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run([*pip, "-r", str(wanted)], capture_output=True, text=True)
        if done.returncode:
            raise PeerError(f"pip: {done.stderr.strip().splitlines()[-1][:160]}")
        shutil.copy(wanted, made)
    first = wanted.read_text().splitlines()
    named = next(line for line in first if peer.replace("_", "-") in line)
    return python, named.partition("==")[2]


def _lines(peer: str) -> int:
    """Lines of a runner, and of what it shares, without documentation, comments and blanks."""
    return sum(
        len(ast.unparse(_bare(path)).splitlines())
        for path in (HERE / f"with_{peer}.py", HERE / "picture.py")
        if path.stem == f"with_{peer}" or "from picture" in (HERE / f"with_{peer}.py").read_text()
    )


def _bare(path: Path) -> ast.Module:
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                del node.body[0]
    return tree


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--pictures", type=int, default=2000)
    parser.add_argument("--side", type=int, default=512, help="of a picture in pixels")
    parser.add_argument("--questions", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=32, help="questions at once")
    parser.add_argument("--latency", type=float, default=0.2, help="of the server, in seconds")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument(
        "--kills", action=argparse.BooleanOptionalAction, default=True, help="kill each one as well"
    )
    parser.add_argument("--folder", help="where the data lies meanwhile")
    parser.add_argument(
        "--envs", type=Path, default=Path(tempfile.gettempdir()) / "dim-peers", help="environments"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
