"""Nodes that Ray's autoscaler starts for a job and ends after it, one of them killed meanwhile."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from benchmarks.cluster_chain import ALL_KEPT, Store, check, follow, make_edits
from benchmarks.cluster_head import ROOT, Head, Site, head, told, wait_for
from infra.ports import free_port

RECORDS = 96
HEAD_GROUP, ENCODERS, TRAINERS = "ray.head.default", "encoder-gpu", "training-gpu"
_NODE_ID = "RAY_OVERRIDE_NODE_ID_FOR_TESTING"
_HEAD_ID = "f" * 51 + "00000"  # by which Ray's fake provider knows the head
_PROVIDER = "benchmarks.cluster_nodes.NodesWithFolders"
_HEADING = """\
| job | node killed | nodes at work | first node after, s | whole, s | back to 0 after, s |
| --- | --- | --- | ---: | ---: | ---: |"""
_CPUS = {ENCODERS: 3, TRAINERS: 5}
"""What a worker of each job takes. There is no GPU here: workers compute on CPUs, of which they ask
for as many as fill a node of their group, and only a node with a GPU offers."""
_MOST = 2  # nodes of a group
_STORE_BYTES = 200 * 2**20  # of each node, for Ray's objects


def run_scaling(place: Site) -> None:
    """Features and training on nodes from zero and back; demands that can never be met."""
    with scaling_head(place) as started, Nodes(started) as nodes:
        make_edits(started, RECORDS)
        wait_for(lambda: not any(nodes.alive[group] for group in _CPUS), "no node", patience_s=120)
        print(_HEADING, flush=True)
        for name, group in (("features", ENCODERS), ("training", TRAINERS)):
            whole = [_run(started, nodes, name, group, kill) for kill in (False, True)]
            print(f"a killed node costs {name} {whole[1] - whole[0]:.0f} s", flush=True)
        _hopeless(started)


@contextmanager
def scaling_head(place: Site) -> Iterator[Head]:
    """A head whose autoscaler starts Ray nodes on this machine, as processes."""
    gcs = free_port()
    groups = {
        group: {
            "resources": {"CPU": cpus, "GPU": 1, "object_store_memory": _STORE_BYTES},
            "labels": {"dim/group": group},
            "node_config": {},
            "min_workers": 0,
            "max_workers": _MOST,
        }
        for group, cpus in _CPUS.items()
    }
    own = {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 0}
    config = {
        "cluster_name": "dim",
        "max_workers": 4,
        "upscaling_speed": 4.0,
        "idle_timeout_minutes": 0.1,
        "provider": {
            "type": "external",  # as which it does not want a file that the wheel lacks
            "module": _PROVIDER,
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": _HEAD_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "available_node_types": {HEAD_GROUP: own, **groups},
        "head_node_type": HEAD_GROUP,
        # Nodes are processes here: nothing is installed on them.
        "auth": {}, "docker": {}, "file_mounts": {},
        **dict.fromkeys(
            ("cluster_synced_files", "rsync_exclude", "rsync_filter", "initialization_commands",
             "setup_commands", "head_setup_commands", "worker_setup_commands",
             "head_start_ray_commands", "worker_start_ray_commands"), (),
        ),
    }  # fmt: skip
    file = place.folder / "autoscaling.json"
    file.write_text(json.dumps(config))
    variables = {
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": _HEAD_ID,
        _NODE_ID: _HEAD_ID,
        "RAY_NODE_TYPE_NAME": HEAD_GROUP,
    }
    options = ("--autoscaling-config", str(file), "--num-cpus", "2")
    with head(place, *options, variables=variables, gcs_port=gcs) as started:
        yield started


class Nodes:
    """What nodes there are, looked at twice a second.

    Args:
        of: the head.

    Attributes:
        alive, busy: how many there are of each group, and of them those with something to do.
        course: of each group, how many were busy, a number for each change.
    """

    def __init__(self, of: Head) -> None:
        self._head = of
        self._ended = threading.Event()
        self.alive: Counter[str] = Counter()
        self.busy: Counter[str] = Counter()
        self.course: dict[str, list[int]] = {group: [0] for group in _CPUS}
        self._ids: dict[str, list[str]] = {}

    def __enter__(self) -> Nodes:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()

    def kill(self, group: str) -> None:
        """End a node of ``group`` that works, by SIGKILL: all that Ray runs on it goes with it."""
        node, home = self._ids[group][-1], str(self._head.site.folder)
        for process in psutil.process_iter():
            with suppress(psutil.Error, ProcessLookupError):
                its = process.environ()
                if its.get(_NODE_ID) == node and its.get("HOME") == home:
                    os.kill(process.pid, signal.SIGKILL)

    def _look(self) -> None:
        from ray._raylet import GcsClient  # type: ignore[attr-defined]
        from ray.core.generated.autoscaler_pb2 import (  # type: ignore[attr-defined]
            GetClusterStatusReply,
            NodeStatus,
        )
        from ray.exceptions import RayError

        client = None
        while not self._ended.wait(0.5):
            try:
                client = client or GcsClient(self._head.gcs)
                status = client.get_cluster_status(timeout_s=10)
            except RayError:
                continue
            alive, busy, ids = Counter(), Counter(), {}
            for node in GetClusterStatusReply.FromString(status).cluster_resource_state.node_states:
                if node.status == NodeStatus.DEAD:
                    continue
                group = node.ray_node_type_name
                alive[group] += 1
                if node.available_resources.get("CPU", 0) < node.total_resources.get("CPU", 0):
                    busy[group] += 1
                    ids.setdefault(group, []).append(node.node_id.hex())
            self.alive, self.busy, self._ids = alive, busy, ids
            for group, numbers in self.course.items():
                if busy[group] != numbers[-1]:
                    numbers.append(busy[group])


def _command(head: Head, name: str, killed: bool) -> tuple[list[str], str]:
    """A job, and the folder in which its first sign of progress will be."""
    out = f"{name}{'-killed' if killed else ''}"
    store = head.site.store
    if name == "features":
        return [
            "data", "features", "--stage", "configs/tiny-edit2.yaml", "--model",
            "configs/tiny.yaml", "--data", f"{store}/edits", "--out", f"{store}/{out}",
            "rows_per_file=4", "workers=2", f"cpus_per_worker={_CPUS[ENCODERS]}",
            "encode_batch=2",
        ], f"{out}/ranges/"  # fmt: skip
    return [
        "train", "configs/tiny-edit1.yaml", "init=configs/tiny.yaml", f"data=[{store}/features]",
        f"out={store}/{out}", "steps=120", "batch_size=8", f"workers={told([1, 2])}",
        f"cpus_per_worker={_CPUS[TRAINERS]}", "resize_interval_s=5", "checkpoint_every=10",
        "registry=null",
    ], f"{out}/checkpoints/step-"  # fmt: skip


def _run(head: Head, nodes: Nodes, name: str, group: str, kill: bool) -> float:
    """One job from no node and back to none; the seconds from its submission to its end."""
    command, progress = _command(head, name, kill)
    store = Store(head.site)
    nodes.course[group] = [0]
    began = time.monotonic()
    process = head.submit(*command)
    try:
        wait_for(lambda: nodes.busy[group] > 0, f"a node of {group}", process)
        first = time.monotonic() - began
        if kill:
            wait_for(lambda: bool(store.keys(progress)), f"{name} at work", process)
            wait_for(lambda: nodes.busy[group] == _MOST, f"{_MOST} busy of {group}", process)
            nodes.kill(group)
        log, said = process.communicate(timeout=400)
    finally:
        process.kill()
    whole = time.monotonic() - began
    check(process.returncode == 0, f"{name}, {kill=}: {said}{log}")
    check(name != "features" or ALL_KEPT in log, f"{name}, {kill=}, lost something: {log}")
    back = wait_for(lambda: nodes.alive[group] == 0, f"{group} back to no node", patience_s=120)
    course = " ".join(map(str, nodes.course[group]))
    print(
        f"| {name} | {'yes' if kill else 'no'} | {course} | {first:.0f} | {whole:.0f} | "
        f"{back:.0f} |",
        flush=True,
    )
    return whole


def _hopeless(head: Head) -> None:
    """Demands that no group can ever meet end in a sentence."""
    store = head.site.store
    asks: dict[str, list[Any]] = {
        "features": ["data", "features", "--stage", "configs/tiny-edit2.yaml", "--model",
                     "configs/tiny.yaml", "--data", f"{store}/edits", "--out", f"{store}/never",
                     "gpus_per_worker=4"],
        "training": ["train", "configs/tiny-edit1.yaml", "init=configs/tiny.yaml",
                     f"data=[{store}/features]", f"out={store}/never-trained", "workers=2",
                     "cpus_per_worker=64", "registry=null"],
    }  # fmt: skip
    for name, command in asks.items():
        job = follow(head, name, command, ROOT)
        lines = [line for line in job.log.splitlines() if line.startswith("error: ")]
        check(job.code == 1 and len(lines) == 1 and "wants" in lines[0], f"{name}: {job.log}")
        print(f"{name} for which no group has a node, after {job.driver_s:.0f} s: {lines[0]}")
