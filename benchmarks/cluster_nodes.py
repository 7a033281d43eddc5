"""Nodes that Ray's autoscaler starts as processes of one machine, each with a folder of its own."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import ray._private.parameter
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

BOOT_S = 10.0
"""Before a node begins to start, as a machine takes its time."""


class NodesWithFolders(FakeMultiNodeProvider):
    """Ray's own provider for tests, but that its nodes do not unpack a job's code over each other.

    Its nodes share one folder, where each that joins a job deletes that job's working directory and
    unpacks it anew: whoever imports something meanwhile does not find it. Nodes come one by one.
    """

    def _create_node_with_resources_and_labels(self, *arguments: Any) -> None:
        time.sleep(BOOT_S)
        folder = Path.home() / f"n{self._next_node_id + 1}"  # short: sockets lie below it
        parameters = partial(ray._private.parameter.RayParams, temp_dir=str(folder))
        with mock.patch.object(ray._private.parameter, "RayParams", parameters):
            super()._create_node_with_resources_and_labels(*arguments)
