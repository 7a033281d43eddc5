from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from infra.memory import keep_freed_memory
import numpy as np
if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    [np.ones(1 << 20) for _ in range(6)]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    [np.ones(1 << 20) for _ in range(6)]  # 48 MiB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only glibc can be told so")
def test_what_is_freed_is_used_again() -> None:
    def faults(how: str) -> int:
        command = [sys.executable, "-c", FAULTS, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert faults("kept") < 100 < 1_000 < faults("given back")
