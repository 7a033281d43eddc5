"""A cluster on one machine, seen working: the whole loop by jobs, nodes that come and go, faults.

    python -m benchmarks.cluster chain again     # fifteen minutes on two busy cores
    python -m benchmarks.cluster scaling         # twelve
    sudo python -m benchmarks.cluster links      # eleven; needs root, `unshare` and `ip`
    python -m benchmarks.cluster control         # seven; needs redis-server

Starts what a site has, all on this machine and in a home folder of its own: a head of Ray that asks
for its token, an S3 server (rclone's), an MLflow server over SQLite that keeps artifacts in S3.

``chain`` submits ingest, filter, edit, captions, features, three stages, evaluation and release
with ``dim submit``, leaves one job by Ctrl-C and follows it again, and lets jobs fail. ``again``,
on another head, submits every job once more and sees that nothing is written; it serves what was
released and has it edit a picture. ``scaling`` runs features and training on nodes that an
autoscaler starts from none, and kills one. ``links`` cuts the link between two hosts for 20 s,
``control`` kills Ray's control. Each leaves with an error where something is not as it is to be.
"""

from __future__ import annotations

import argparse
import signal
from collections.abc import Callable
from pathlib import Path

from benchmarks.cluster_chain import run_again, run_chain
from benchmarks.cluster_head import Head, head, home, site
from benchmarks.cluster_links import SITE, hosts, inside_a_namespace, run_control, run_links
from benchmarks.cluster_scaling import run_scaling


def main() -> None:
    """Run the parts that are named."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="+", choices=_PARTS)
    parser.add_argument("--folder", type=Path, help="Keep the site here, with a short name.")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started ends with it
    if "links" in options.parts:
        inside_a_namespace()
    with home(options.folder) as folder:
        for part in options.parts:
            _PARTS[part](folder)


def _on_a_head(run: Callable[[Head], None]) -> Callable[[Path], None]:
    def part(folder: Path) -> None:
        with site(folder) as place, head(place, "--num-cpus", "4") as started:
            run(started)

    return part


def _scaling(folder: Path) -> None:
    with site(folder) as place:
        run_scaling(place)


def _links(folder: Path) -> None:
    with hosts() as names, site(folder, host=SITE) as place:
        run_links(place, names)


def _control(folder: Path) -> None:
    with site(folder) as place:
        run_control(place)


_PARTS: dict[str, Callable[[Path], None]] = {
    "chain": _on_a_head(run_chain),
    "again": _on_a_head(run_again),
    "scaling": _scaling,
    "links": _links,
    "control": _control,
}


if __name__ == "__main__":
    main()
