"""The workers of a stage: who one is, what it computes on, and all that they do together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar, cast

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from dim.learning.step import Trainable
from dim.model import DIM

T = TypeVar("T")


def this_worker() -> tuple[int, int, torch.device]:
    """This worker's rank, the number of workers, and this worker's device."""
    context = ray.train.get_context()
    return context.get_world_rank(), context.get_world_size(), ray.train.torch.get_device()


def place(
    model: DIM, device: torch.device, precision: str, *, frozen: bool, keep: bool = True
) -> None:
    """Trained parts in float32; frozen ones in bfloat16 where that is what a GPU is fast at.

    Without ``frozen`` the frozen parts are not used and do not take the GPU's memory; nor, unless
    this worker is to ``keep`` them (to hash and to export), the machine's.
    """
    model.train()
    for part in (model.connector, model.painter):
        part.to(device).requires_grad_(True).float()
    if not frozen:
        if not keep:
            for unused in (model.conditioner, model.autoencoder):
                unused.to("meta")
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


def make_mesh(workers: int, parts: int, device: torch.device) -> DeviceMesh | None:
    """The workers as (copies, parts) of the weights; ``None`` where each holds all (a collective).

    The parts of a copy are workers of neighbouring ranks.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if parts == 1:
        return None
    if parts == workers:
        return init_device_mesh(device.type, (parts,), mesh_dim_names=("part",))
    shape = (workers // parts, parts)
    return init_device_mesh(device.type, shape, mesh_dim_names=("copy", "part"))


def shard(module: Trainable, mesh: DeviceMesh | None) -> None:
    """Leave each worker its part of ``module``'s weights, in place.

    A block's weights come together while it computes. They travel in float32: autocast alone says
    what is computed in less, here as under DDP (``dim.model.attention`` says what is not).
    """
    if mesh is None:
        return
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in module.painter.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=False)


def wrap(module: nn.Module) -> nn.Module:
    """``module`` with its gradients averaged over all workers (a collective)."""
    if isinstance(module, FSDPModule):
        return module
    return ray.train.torch.prepare_model(
        module,
        move_to_device=False,
        parallel_strategy_kwargs={"gradient_as_bucket_view": True},
    )


def averaging(module: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Forward and backward passes inside leave ``module`` gradients that are averaged over all.

    Of several passes of a step only the ``last`` waits for the other workers; the ones before add
    up on each worker. Sharded gradients are brought to their parts at each pass, or every worker
    would hold them whole; only their copies wait for the last.
    """
    if isinstance(module, FSDPModule):
        module.set_requires_all_reduce(last)
    if last or not isinstance(module, DistributedDataParallel):
        return nullcontext()
    return module.no_sync()


def clear_gradients(module: nn.Module) -> None:
    """End a step. Under DDP gradients stay where they are exchanged, and the next add up there.

    Gradients of their own would be a second copy of all until the last pass, and copied in it.
    """
    module.zero_grad(set_to_none=not isinstance(module, DistributedDataParallel))


def clip_gradients(module: nn.Module, max_norm: float) -> torch.Tensor:
    """Scale the gradients to a norm of ``max_norm`` at most; their norm before (a collective).

    All workers have the same: what is averaged, or a sum of all parts.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, every worker holds all weights of ``module`` (a collective).

    So its parts may be called one by one, and by each worker as often as it likes.
    """
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        if isinstance(module, FSDPModule):
            # A block called by itself leaves a trace, by which later passes would fetch blocks
            # ahead: workers with unequal traces would wait for one another for ever.
            module.reset_iter_state()
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(part is not module, recurse=False)


def gathered(value: Any) -> Any:
    """``value`` with the sharded tensors in its dicts and lists whole (a collective).

    On the first worker they are on the CPU then; others, which do not save them, get ``None``.
    """
    if isinstance(value, dict):
        return {key: gathered(one) for key, one in value.items()}
    if isinstance(value, list):
        return [gathered(one) for one in value]
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else None


def agree(error: Exception | None, group: dist.ProcessGroup | None = None) -> Exception | None:
    """The first worker's error, on every worker, so that all stop or none (a collective)."""
    if _alone():
        return error
    errors: list[Exception | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, error, group=group)
    return next((one for one in errors if one is not None), None)


def any_sees(signs: Sequence[bool], device: torch.device) -> Callable[[], list[bool]]:
    """Begin to tell all workers what this one sees (a collective); call what is returned to wait.

    It says of each of ``signs`` whether any worker sees it. One collective for all of them, on its
    way while ``device`` computes.
    """
    seen = torch.tensor(signs, dtype=torch.float32, device=device)
    telling = None if _alone() else dist.all_reduce(seen, async_op=True)

    def told() -> list[bool]:
        if telling is not None:
            telling.wait()
        return [count > 0 for count in seen.tolist()]

    return told


def side_group(timeout_s: float) -> dist.ProcessGroup | None:
    """All workers, for what has to be apart from what a step exchanges (a collective).

    What a thread of each sends while they train would meet what a step sends; and a step's patience
    is too short where one has to prepare more than another.
    """
    if _alone():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))


def from_first(item: T, group: dist.ProcessGroup | None = None) -> T:
    """The first worker's ``item``, on every worker (a collective)."""
    if _alone():
        return item
    items = [item]
    dist.broadcast_object_list(items, group=group)
    return items[0]


def scatter(items: Sequence[T] | None, group: dist.ProcessGroup | None = None) -> T:
    """Of the first worker's ``items``, one for each, this worker's (a collective)."""
    if _alone():
        assert items is not None
        return items[0]
    mine: list[T | None] = [None]
    dist.scatter_object_list(mine, None if items is None else list(items), group=group)
    return cast(T, mine[0])


def mean(value: torch.Tensor) -> torch.Tensor:
    """The mean of all workers' ``value``, on every worker (a collective)."""
    return value if _alone() else total(value) / dist.get_world_size()


def total(value: torch.Tensor) -> torch.Tensor:
    """The sum of all workers' ``value``, on every worker (a collective)."""
    if _alone():
        return value
    summed = value.clone()
    dist.all_reduce(summed)
    return summed


def gather(items: list[T], group: dist.ProcessGroup | None = None) -> list[T] | None:
    """Every worker's ``items``, on rank 0 (a collective); ``None`` on the others."""
    if _alone():
        return items
    parts: list[list[T]] | None = None
    if dist.get_rank() == 0:
        parts = [[] for _ in range(dist.get_world_size())]
    dist.gather_object(items, parts, group=group)
    return None if parts is None else [item for part in parts for item in part]


def world_size() -> int:
    """The number of workers."""
    return dist.get_world_size() if dist.is_initialized() else 1


def _alone() -> bool:
    return world_size() == 1
