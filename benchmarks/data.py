"""Every speed and memory bar of the data jobs, one after the other.

    python -m benchmarks.data

Runs :mod:`benchmarks.data_filters` and :mod:`benchmarks.data_calls`, each in a process of its own
so that neither warms the other, and fails when one of them does. Both take options of their own;
this takes none and measures what the documentation reports (about 20 minutes on two cores).
"""

from __future__ import annotations

import subprocess
import sys

BENCHMARKS = ("benchmarks.data_filters", "benchmarks.data_calls")


def main() -> int:
    """Run them all, also after one has failed; returns the worst exit status."""
    return max(
        subprocess.run([sys.executable, "-m", name], check=False).returncode for name in BENCHMARKS
    )


if __name__ == "__main__":
    sys.exit(main())
