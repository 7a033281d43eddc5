"""``dim doctor`` on a cluster of two nodes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

# Two nodes, of which the second cannot reach the store: it has another secret.
CLUSTER = """
import os, sys
from ray.cluster_utils import Cluster

head = dict(num_cpus=0, include_dashboard=False)
cluster = Cluster(initialize_head=True, head_node_args=head)
os.environ["AWS_SECRET_ACCESS_KEY"] = "another"
cluster.add_node(num_cpus=1)
os.environ["AWS_SECRET_ACCESS_KEY"] = sys.argv[1]
os.environ["RAY_ADDRESS"] = cluster.address
try:
    from dim.cli import run
    from infra.doctor import main
    run(main, ["--json", "--store", sys.argv[2]])
finally:
    cluster.shutdown()
"""


def test_every_node_looks_for_itself(rclone_s3: str) -> None:
    secret = os.environ["AWS_SECRET_ACCESS_KEY"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", CLUSTER, secret, rclone_s3],
        env=environment, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout[done.stdout.index("[") :])
    written = [finding["status"] for finding in found if finding["check"] == "bucket: write"]
    assert sorted(written) == ["failed", "ok"]
    assert len({finding["node"] for finding in found if finding["check"] == "gpu"}) == 2
    (versions,) = [finding for finding in found if finding["check"] == "versions"]
    assert versions["status"] == "ok" and versions["said"] == "the same on all 2 nodes"
