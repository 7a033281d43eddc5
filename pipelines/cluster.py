"""The cluster that a job runs on: the one it was submitted to, or one of its own."""

from __future__ import annotations

import logging
import os
import sys

import ray
from ray.data import DataContext


def connect() -> None:
    """Make sure that Ray is there.

    Uses what the process is connected to already; else the cluster that ``RAY_ADDRESS`` names (set
    by ``ray job submit``); else starts a local one, which ends with the process.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS", "local")
        # A single core must still run a designer beside the reading and writing.
        own = {"num_cpus": max(2, os.cpu_count() or 1)} if address == "local" else {}
        ray.init(
            address=address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **own,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.execution_options.preserve_order = True
