"""A node and what it reaches; all nodes of a cluster, which must have the same versions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from infra.diagnosis.bucket import examine_store
from infra.diagnosis.finding import Finding, Status
from infra.diagnosis.machine import examine_machine, versions
from infra.diagnosis.tracker import examine_tracker
from infra.ray_cluster import join

PATIENCE_S = 120.0
"""Until a node has answered, which may have to start a worker and import torch first."""

Answer = tuple[dict[str, str], list[Finding]]


class Wanted(NamedTuple):
    """What a node is to reach; ``None``: nobody said."""

    store: str | None
    tracking: str | None
    folders: tuple[str, ...] = ()


def examine_node(wanted: Wanted) -> Iterator[Finding]:
    """What there is to say of this machine: what it reaches, and what it is."""
    if wanted.store:
        yield from examine_store(wanted.store)
    else:
        yield Finding("bucket", Status.SKIPPED, "no store named", "say --store s3://BUCKET/FOLDER")
    if wanted.tracking:
        yield examine_tracker(wanted.tracking)
    else:
        yield Finding("tracking", Status.SKIPPED, "no server named", "say --tracking http://…")
    yield from examine_machine(wanted.folders)


def examine_cluster(address: str, wanted: Wanted) -> Iterator[Finding]:
    """The same of every node of the cluster at ``address``, asked there; and their versions."""
    import ray

    try:
        join(address, log_to_driver=False, configure_logging=False)
    except Exception as error:  # of many kinds, none of which is ours
        said = f"{address} cannot be joined: {next(iter(str(error).splitlines()), 'no answer')}"
        advice = "start it (`ray start --head`, `ray up`), or unset RAY_ADDRESS"
        yield Finding("cluster", Status.FAILED, said, advice)
        return
    try:
        yield from _nodes(wanted)
    finally:
        ray.shutdown()


def _nodes(wanted: Wanted) -> Iterator[Finding]:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    # Beside whatever runs there: it takes no CPU.
    task = ray.remote(_answer)
    asked = {
        node: task.options(
            num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)
        ).remote(wanted)
        for node in alive
    }
    ray.wait(list(asked.values()), num_returns=len(asked), timeout=PATIENCE_S)
    answers: dict[str, dict[str, str]] = {}
    for node, reference in asked.items():
        name = f"{alive[node]} ({node[:6]})"
        try:
            found, findings = ray.get(reference, timeout=0.1)
        except Exception as error:  # a lost node, a worker that cannot import this
            said = f"does not answer: {type(error).__name__}"
            advice = "look at its logs (`ray logs cluster`), and whether this package is there"
            yield Finding("node", Status.FAILED, said, advice, name)
            continue
        answers[name] = found
        yield from (replace(finding, node=name) for finding in findings)
    yield compare(answers)


def _answer(wanted: Wanted) -> Answer:
    """What a node says of itself."""
    return versions(), list(examine_node(wanted))


def compare(answers: Mapping[str, Mapping[str, str]]) -> Finding:
    """Whether the nodes have the same versions.

    Args:
        answers: versions by package, by node.
    """
    check = "versions"
    if not answers:
        return Finding(check, Status.SKIPPED, "no node answers")
    differing = [
        f"{package} is {_spread(package, answers)}"
        for package in next(iter(answers.values()))
        if len({found[package] for found in answers.values()}) > 1
    ]
    if differing:
        advice = "let all nodes run one image (docker.worker_image, spec.…containers.image)"
        return Finding(check, Status.FAILED, "; ".join(differing), advice)
    return Finding(check, Status.OK, f"the same on all {len(answers)} nodes")


def _spread(package: str, answers: Mapping[str, Mapping[str, str]]) -> str:
    """Such as ``2.13.0 on most, 2.12.1 on 10.0.0.7``."""
    counts = Counter(found[package] for found in answers.values()).most_common()
    (usual, _), *others = counts
    parts = [f"{usual} on most"]
    for other, _ in others:
        nodes: Sequence[str] = [node for node, found in answers.items() if found[package] == other]
        more = f" and {len(nodes) - 3} more" if len(nodes) > 3 else ""
        parts.append(f"{other} on {', '.join(nodes[:3])}{more}")
    return ", ".join(parts)
