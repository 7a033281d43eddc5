"""The cluster that a job runs on: the one it was submitted to, or one of its own."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from functools import cache, cached_property
from operator import attrgetter

import ray
from ray.data import DataContext
from ray.data._internal.execution.execution_callback import ExecutionCallback
from ray.data._internal.execution.streaming_executor import StreamingExecutor
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_random

from dim.errors import DimError
from infra.capacity import WAIT_S, Demand, Watch
from infra.logs import ray_logging
from infra.ray_cluster import join

_NODES_WAIT_S = "dim_nodes_wait_s"


def connect(nodes_wait_s: float = WAIT_S) -> bool:
    """Make sure that Ray is there, and that no job waits there for what never comes.

    Uses what the process is connected to already; else the cluster that ``RAY_ADDRESS`` names (set
    by ``ray job submit``); else starts a local one, which ends with the process, or before it by
    ``ray.shutdown`` where this call has started it.

    Args:
        nodes_wait_s: how long a job waits where no node has what its workers want.

    Returns:
        Whether it is this call that connected.

    Raises:
        DimError: the cluster does not answer.
    """
    connects = not ray.is_initialized()
    if connects:
        _init(os.environ.get("RAY_ADDRESS", "local"))
    _pass_by_value()
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.set_config(_NODES_WAIT_S, nodes_wait_s)
    for callback in (EndHopelessWait, LearnSizeAtOnce):
        if callback not in context.custom_execution_callback_classes:
            context.custom_execution_callback_classes.append(callback)
    return connects


def _init(address: str) -> None:
    begin = ray.init if address == "local" else join
    try:
        # A head that starts so many processes at once that it does not answer in time does later.
        for attempt in Retrying(
            retry=retry_if_exception_type(ConnectionError), stop=stop_after_delay(60),
            wait=wait_random(1, 3), reraise=True,
        ):  # fmt: skip
            with attempt:
                # A single core must still run a designer beside the reading and writing.
                begin(
                    address=address,
                    num_cpus=max(2, os.cpu_count() or 1) if address == "local" else None,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    logging_config=ray_logging(),
                )
    except ConnectionError as error:
        raise DimError(f"Ray at {address} does not answer: {error.__cause__ or error}") from error


class EndHopelessWait(ExecutionCallback):
    """Ends a job with a sentence where none of an operator's workers can ever start.

    Ray Data makes one for each execution, calls it at each step of its scheduler, and hands what it
    raises to whoever reads the data set.
    """

    def __init__(self) -> None:
        self._watch = Watch(DataContext.get_current().get_config(_NODES_WAIT_S, WAIT_S))

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Look whether what still works can have what it wants."""
        self._watch.check(_demands(executor))


class LearnSizeAtOnce(ExecutionCallback):
    """Lets a job have the whole cluster from the start.

    Ray Data asks an actor how large the cluster is and looks for the answer a second later; until
    then it runs one task at a time. With this it looks at each step of its scheduler.
    """

    def on_execution_step(self, executor: StreamingExecutor) -> None:
        """Look again, as long as no answer is there."""
        manager = executor._resource_manager
        if manager is not None and manager._global_limits.is_zero():
            manager._global_limits_last_update_time = 0


def _demands(executor: StreamingExecutor) -> Iterator[Demand]:
    for operator in executor._topology or ():
        if operator.has_completed():
            continue
        one = operator.min_scheduling_resources()
        each = {"CPU": one.cpu, "GPU": one.gpu, "memory": one.memory}
        if each := {name: amount for name, amount in each.items() if amount}:
            yield Demand(operator.name, 1, each)


@cache
def _pass_by_value() -> None:
    """Let Ray Data give its actors what they are made of as values.

    It puts both into the object store for as long as the pool lives, and Ray then warns at every
    pool that they could be gone when an actor is restarted (ray-project/ray#53727). They are some
    kilobytes. Of another Ray, which may do otherwise, nothing is changed.
    """
    with suppress(ImportError):
        from ray.data._internal.execution.operators import actor_pool_map_operator

        pool = actor_pool_map_operator.ActorPoolMapOperator
        for name, value in (("_data_context", "data_context"), ("_map_transformer",) * 2):
            if isinstance(getattr(pool, f"{name}_ref", None), cached_property):
                setattr(pool, f"{name}_ref", property(attrgetter(value)))
