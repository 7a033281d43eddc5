"""What workers do together, on two processes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from dim import model
from dim.errors import InputError
from dim.learning.step import Trainable
from dim.model import attention
from tests.training.workers import start
from training import parallel


def copies_of_gradients() -> list[bool]:
    """Whether the passes of a later step have gradients elsewhere than the step before had them.

    (DDP makes its buckets anew after the first step.)
    """
    module = nn.Linear(3, 3)
    wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
    places, moved = set[int](), []
    for _ in range(4):
        for last in (False, True):
            with parallel.averaging(wrapped, last):
                wrapped(torch.ones(1, 3)).sum().backward()
            assert module.weight.grad is not None
            moved.append(module.weight.grad.data_ptr() not in places)
        places = {module.weight.grad.data_ptr()}
        assert module.weight.grad.eq(2).all()  # of two passes, and of no step before
        parallel.clear_gradients(wrapped)
    return moved[-2:]


def take_part(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    value = torch.tensor(1.0 + rank)
    first = parallel.agree(InputError(f"worker {rank} found it") if rank == 1 else None)
    wrapped = DistributedDataParallel(nn.Linear(1, 1))
    waits = []
    for last in (False, True):
        with parallel.averaging(wrapped, last):
            waits.append(wrapped.require_backward_grad_sync)
    found = {
        "waits": waits,
        "copies": copies_of_gradients(),
        "mean": parallel.mean(value).item(),
        "value": value.item(),
        "seen": parallel.any_sees([rank == 0, rank == 1, False], value.device)(),
        "scattered": parallel.scatter([3, 4] if rank == 0 else None),
        "from first": parallel.from_first(f"worker {rank}"),
        "gathered": parallel.gather([rank, rank + 10]),
        "first": f"{type(first).__name__}: {first}",
        "none": parallel.agree(None) is None,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    del wrapped  # it holds the group, whose end waits for threads that wait for Python
    dist.destroy_process_group()


def test_two_workers_agree_average_and_gather(tmp_path: Path) -> None:
    start(take_part, (str(tmp_path),), 2)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["mean"] == other["mean"] == 1.5
    assert (one["value"], other["value"]) == (1.0, 2.0)  # what was given is left alone
    assert one["gathered"] == [0, 10, 1, 11] and other["gathered"] is None
    assert one["first"] == other["first"] == "InputError: worker 1 found it"
    assert one["none"] and other["none"]
    assert one["waits"] == other["waits"] == [False, True]
    assert one["copies"] == other["copies"] == [False, False]
    assert one["seen"] == other["seen"] == [True, True, False]
    assert (one["scattered"], other["scattered"]) == (3, 4)
    assert one["from first"] == other["from first"] == "worker 0"


def prepare_for_long(rank: int, folder: str) -> None:
    short = timedelta(seconds=2)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", timeout=short, init_method=meet, rank=rank, world_size=2)
    group = parallel.side_group(60.0)
    if rank == 1:
        time.sleep(2 * short.total_seconds())
    error = parallel.agree(InputError("slowly") if rank == 1 else None, group)
    Path(folder, f"{rank}.txt").write_text(str(error))
    dist.destroy_process_group()


def test_a_worker_that_prepares_for_long_is_waited_for_for_longer_than_a_step(
    tmp_path: Path,
) -> None:
    start(prepare_for_long, (str(tmp_path),), 2)
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in (0, 1)] == ["slowly"] * 2


def test_one_worker_needs_nobody() -> None:
    error = InputError("here")
    assert parallel.agree(error) is error and parallel.agree(None) is None
    assert parallel.mean(torch.tensor(3.0)).item() == 3.0
    assert parallel.gather([1, 2]) == [1, 2]
    assert parallel.from_first("here") == "here"
    assert parallel.any_sees([True, False], torch.device("cpu"))() == [True, False]
    assert parallel.scatter([5]) == 5 and parallel.side_group(1.0) is None


def test_frozen_parts_that_nobody_uses_are_kept_by_the_first_worker_only(
    tiny_model_dir: Path,
) -> None:
    cpu = torch.device("cpu")
    for keep, frozen_are in ((True, "cpu"), (False, "meta")):
        loaded = model.load(tiny_model_dir)
        parallel.place(loaded, cpu, "fp32", frozen=False, keep=keep)
        devices = [
            {parameter.device.type for parameter in part.parameters()}
            for part in (loaded.conditioner, loaded.autoencoder, loaded.connector, loaded.painter)
        ]
        assert devices == [{frozen_are}, {frozen_are}, {"cpu"}, {"cpu"}]


def test_the_precision_of_a_forward_pass() -> None:
    weight = torch.ones(2, 2)
    device = torch.device("cpu")
    with parallel.autocast(device, "bf16"):
        assert (weight @ weight).dtype == torch.bfloat16
    with parallel.autocast(device, "fp32"):
        assert (weight @ weight).dtype == torch.float32


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[DeviceMesh]:
    """A process group of one, for what needs one."""
    meet = f"file://{tmp_path / 'meet'}"
    dist.init_process_group("gloo", init_method=meet, rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("sharded", [False, True])
def test_bf16_is_for_products_and_nothing_else(
    tiny_model_dir: Path,
    one_process: DeviceMesh,
    monkeypatch: pytest.MonkeyPatch,
    sharded: bool,
) -> None:
    module = Trainable(model.load(tiny_model_dir)).train()
    parallel.shard(module, one_process if sharded else None)
    seen: dict[str, set[torch.dtype]] = {}

    def see(name: str, *tensors: torch.Tensor) -> None:
        seen.setdefault(name, set()).update(tensor.dtype for tensor in tensors)

    summed = attention.linear_attention
    monkeypatch.setattr(
        attention,
        "linear_attention",
        lambda *states: (see("sums", *states), summed(*states))[1],
    )
    block = module.painter.blocks[0]
    block.attn1.to_q.register_forward_hook(lambda _, args, out: see("products", out))
    block.norm1.register_forward_hook(
        lambda *_: see("weights", block.attn1.to_q.weight, block.scale_shift_table)
    )
    module.painter.blocks[1].register_forward_hook(lambda _, args, out: see("residual", out))
    mask = torch.ones(2, 5, dtype=torch.bool)
    latent = torch.randn(2, 8, 8, 8)
    with parallel.autocast(torch.device("cpu"), "bf16"):
        velocity = module(
            latent, torch.tensor([10.0, 900.0]), torch.randn(2, 5, 128), mask, latent, mask[:, 0]
        )
    velocity.square().mean().backward()
    see("gradients", *(p.grad for p in module.parameters() if p.grad is not None))
    assert seen == {
        "products": {torch.bfloat16},
        **{name: {torch.float32} for name in ("weights", "sums", "residual", "gradients")},
    }


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sharded_blocks_can_be_compiled(
    tiny_model_dir: Path, one_process: DeviceMesh, checkpointed: bool
) -> None:
    graphs: list[object] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    torch._dynamo.reset()
    plain, quick = model.load(tiny_model_dir), model.load(tiny_model_dir)
    quick.painter.compile_blocks(backend=counting)
    quick.painter.checkpoint_gradients(checkpointed)
    one, other = Trainable(plain).train(), Trainable(quick, token_multiple=64).train()
    parallel.shard(other, one_process)
    counts = []
    for tokens in (5, 130, 300, 190):
        mask, latent = torch.ones(2, tokens, dtype=torch.bool), torch.randn(2, 8, 8, 8)
        states, told = torch.randn(2, tokens, 128), torch.tensor([10.0, 900.0])
        given = (latent, told, states, mask, latent, mask[:, 0])
        losses = [module(*given).square().mean() for module in (one, other)]
        for loss in losses:
            loss.backward()
        counts.append(len(graphs))
        torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
    assert counts[0] > 0 and counts[-1] == counts[-2]  # 300 tokens were new, a second 192 are not
    for whole, part in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(part.grad.full_tensor(), whole.grad, atol=1e-3)


def test_what_is_not_sharded_stays_as_it_is() -> None:
    assert parallel.make_mesh(4, 1, torch.device("cpu")) is None
    plain = torch.ones(3)
    assert parallel.gathered({"a": [plain, 3]}) == {"a": [plain, 3]}
