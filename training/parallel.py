"""The workers of a stage: who one is, what it computes on, and all that they do together."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dim.model import DIM

T = TypeVar("T")


def this_worker() -> tuple[int, int, torch.device]:
    """This worker's rank, the number of workers, and this worker's device."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()


def place(model: DIM, device: torch.device, precision: str, *, frozen: bool) -> None:
    """Trained parts in float32; frozen ones in bfloat16 where that is what a GPU is fast at.

    Without ``frozen`` the frozen parts are not used and do not take the GPU's memory.
    """
    model.train()
    for part in (model.connector, model.painter):
        part.to(device).requires_grad_(True).float()
    if not frozen:
        return
    model.to(device)
    if precision == "bf16" and device.type == "cuda":
        model.conditioner.bfloat16()
        model.autoencoder.bfloat16()


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The precision of a forward pass inside."""
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def wrap(module: nn.Module) -> nn.Module:
    """``module`` with its gradients averaged over all workers (a collective)."""
    return ray.train.torch.prepare_model(
        module,
        move_to_device=False,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )


def averaging(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Forward and backward passes inside leave ``module`` gradients that are averaged over all.

    Of several passes of a step only the ``last`` waits for the other workers; the ones before add
    up on each worker.
    """
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def agree(error: Exception | None) -> Exception | None:
    """The first worker's error, on every worker, so that all stop or none (a collective)."""
    if _alone():
        return error
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error)
    return next((one for one in errors if one is not None), None)


def all_finite(value: torch.Tensor) -> bool:
    """Whether no worker's ``value`` is infinite or no number: one answer for all (a collective)."""
    broken = (~torch.isfinite(value)).float()
    if not _alone():
        dist.all_reduce(broken)
    return broken.item() == 0


def from_first(item: T) -> T:
    """The first worker's ``item``, on every worker (a collective)."""
    if _alone():
        return item
    items = [item]
    dist.broadcast_object_list(items)
    return items[0]


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of all workers' ``value``, on every worker (a collective)."""
    if _alone():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def gather(items: list[T]) -> list[T] | None:
    """Every worker's ``items``, on rank 0 (a collective); ``None`` on the others."""
    if _alone():
        return items
    parts: list[list[T]] | None = None
    if dist.get_rank() == 0:
        parts = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(items, parts)
    return None if parts is None else [item for part in parts for item in part]


def world_size() -> int:
    """The number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _alone() -> bool:
    return world_size() == 1
