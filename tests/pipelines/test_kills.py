"""A few cells of the kill matrix; ``python -m benchmarks.kills`` runs all of it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(("job", "moment"), [("ingest", "before the receipt")])
def test_a_job_that_is_killed_there_loses_nothing(
    ray_cluster: None, tmp_path: Path, job: str, moment: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kills", "--jobs", job, "--moments", moment],
        cwd=ROOT,
        env={
            **os.environ,
            "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
            "TMPDIR": str(tmp_path),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith(f"| {job}")]
    assert [(row[1], row[3:7]) for row in rows] == [
        ("driver", ["yes", "0", "0", "0"]),
        ("worker", ["yes", "0", "0", "0"]),
    ]
