"""Two hosts and the link between them, in network namespaces; a control of Ray that dies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.cluster_chain import ALL_KEPT, Store, check, make_edits
from benchmarks.cluster_head import SCRIPTS, Head, Site, end, head, told, wait_for
from infra.ports import free_port

RECORDS = 64
CUT_S = 20.0
SITE, HEAD, WORKER = "10.77.0.254", "10.77.0.1", "10.77.0.2"
_INSIDE = "DIM_BENCHMARK_HOSTS"
_CARD = {"GLOO_SOCKET_IFNAME": "eth0"}
"""The hosts here share the machine's name, by which gloo would look for its network card."""
_HEADING = """\
| job | fault | whole, s | from its first files on, s |
| --- | --- | ---: | ---: |"""

Fault = Callable[[], None]


def inside_a_namespace() -> None:
    """Begin this program anew in a network of its own, in which it may make hosts.

    Raises:
        RuntimeError: ``unshare`` is not there; it says itself that it takes root.
    """
    if os.environ.get(_INSIDE):
        _ip("link set lo up")
        return
    if shutil.which("unshare") is None:
        raise RuntimeError("links: unshare is not there (of util-linux)")
    again = ["unshare", "--net", sys.executable, "-m", "benchmarks.cluster", *sys.argv[1:]]
    os.execvpe(again[0], again, {**os.environ, _INSIDE: "1"})  # noqa: S606, ourselves


@contextmanager
def hosts() -> Iterator[tuple[str, str]]:
    """Two hosts on a switch, where this process is a third; gives their names.

    The store and MLflow are here, the head is one host, and its worker the other.
    """
    names = tuple(f"dim-{each}-{os.getpid()}" for each in ("head", "worker"))
    for command in (
        "link add dim type bridge",
        f"addr add {SITE}/24 dev dim",
        "link set dim up",
    ):
        _ip(command)
    try:
        for number, (name, address) in enumerate(zip(names, (HEAD, WORKER), strict=True)):
            for command in (
                f"netns add {name}",
                f"link add dim{number} type veth peer name eth0 netns {name}",
                f"link set dim{number} master dim up",
                f"-n {name} addr add {address}/24 dev eth0",
                f"-n {name} link set eth0 up",
                f"-n {name} link set lo up",
                f"-n {name} route add default via {SITE}",  # by which a host finds its own address
            ):
                _ip(command)
        yield names[0], names[1]
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], check=False)


def cut_the_link() -> None:
    """For a while nothing reaches the worker's host, neither from the head nor from the store."""
    _ip("link set dim1 down")
    time.sleep(CUT_S)
    _ip("link set dim1 up")


def run_links(place: Site, names: tuple[str, str]) -> None:
    """A data job and a stage on both hosts, undisturbed and while the link is cut."""
    inside = [["ip", "netns", "exec", name] for name in names]
    with (
        head(place, "--num-cpus", "3", host=HEAD, prefix=inside[0], variables=_CARD) as started,
        _worker(started, WORKER, inside[1]),
    ):
        make_edits(started, RECORDS)
        print(_HEADING, flush=True)
        fault = f"link cut for {CUT_S:.0f} s"
        for name in ("features", "training"):
            _both(started, name, fault, cut_the_link)


def run_control(place: Site) -> None:
    """The same while the control of Ray is killed and comes back from Redis."""
    redis = shutil.which("redis-server")
    if redis is None:
        raise RuntimeError("control: redis-server is not there (apt-get install redis-server)")
    port = free_port()
    with (place.folder / "redis.log").open("wb") as log:
        server = subprocess.Popen(
            [redis, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir",
             str(place.folder)],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        variables = {"RAY_REDIS_ADDRESS": f"127.0.0.1:{port}"}
        with head(place, "--num-cpus", "6", variables=variables, block=False) as started:
            make_edits(started, RECORDS)
            print(_HEADING, flush=True)
            for name in ("features", "training"):
                _both(started, name, "control killed, back after 5 s",
                      lambda: _restart_control(place.folder))  # fmt: skip
    finally:
        server.kill()
        server.wait()


def _restart_control(folder: Path) -> None:
    """Kill Ray's control (the GCS) and start it again, as it was."""
    for process in psutil.process_iter():
        try:
            command = process.cmdline()
            if not command or not command[0].endswith("gcs_server"):
                continue
            environment = process.environ()
            if environment.get("HOME") != str(folder):
                continue
        except psutil.Error:
            continue
        os.kill(process.pid, signal.SIGKILL)
        time.sleep(5)
        with (folder / "gcs.log").open("ab") as log:
            subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        return
    raise RuntimeError("Ray's control is not there")


@contextmanager
def _worker(of: Head, host: str, prefix: Sequence[str]) -> Iterator[None]:
    with (of.site.folder / f"{host}.log").open("ab") as log:
        process = subprocess.Popen(
            [*prefix, SCRIPTS / "ray", "start", "--block", "--address", of.gcs,
             "--temp-dir", of.site.folder / "worker",
             "--node-ip-address", host, "--num-cpus", "3", "--disable-usage-stats",
             "--object-store-memory", str(300 * 2**20)],
            # Only a head asks for the token, and shows it, where the token lies.
            env={**of.site.environment, **_CARD, "RAY_AUTH_MODE": "token"}, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        end(process)


def _both(head: Head, name: str, fault: str, cause: Fault) -> None:
    for what, its_cause in (("none", None), (fault, cause)):
        whole, working = _run(head, name, its_cause)
        print(f"| {name} | {what} | {whole:.0f} | {working:.0f} |", flush=True)


def _run(head: Head, name: str, cause: Fault | None) -> tuple[float, float]:
    """A job that takes both hosts; the fault comes when it has written something.

    Returns:
        Seconds that it took, and those of them after that.
    """
    store, out = head.site.store, f"{name}{'-disturbed' if cause else ''}"
    commands = {
        "features": [
            "data", "features", "--stage", "configs/tiny-edit2.yaml", "--model",
            "configs/tiny.yaml", "--data", f"{store}/edits", "--out", f"{store}/{out}",
            "rows_per_file=2", "workers=2", "cpus_per_worker=2", "encode_batch=2",
        ],
        "training": [
            "train", "configs/tiny-edit1.yaml", "init=configs/tiny.yaml",
            f"data={told([f'{store}/features'])}", f"out={store}/{out}", "steps=40",
            "batch_size=8", "workers=2", "cpus_per_worker=2", "checkpoint_every=5",
            "registry=null",
        ],
    }  # fmt: skip
    progress = {"features": f"{out}/ranges/", "training": f"{out}/checkpoints/step-"}[name]
    there = Store(head.site)
    began = time.monotonic()
    process = head.submit(*commands[name])
    try:
        before = wait_for(lambda: bool(there.keys(progress)), f"{name} at work", process)
        if cause is not None:
            cause()
            check(process.poll() is None, f"{name} had ended before the fault had")
        log, said = process.communicate(timeout=400)
    finally:
        process.kill()
    whole = time.monotonic() - began
    check(process.returncode == 0, f"{name}, {cause}: {said}{log}")
    check(name != "features" or ALL_KEPT in log, f"{name}, {cause}, lost something: {log}")
    return whole, whole - before


def _ip(command: str) -> None:
    subprocess.run(["ip", *command.split()], check=True)
