"""What workers do together, on two processes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from dim.errors import InputError
from training import parallel


def take_part(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    value = torch.tensor(1.0 + rank)
    first = parallel.agree(InputError(f"worker {rank} found it") if rank == 1 else None)
    found = {
        "mean": parallel.mean(value).item(),
        "value": value.item(),
        "finite": parallel.all_finite(value),
        "not finite": parallel.all_finite(value / rank),  # infinite on the first worker alone
        "from first": parallel.from_first(f"worker {rank}"),
        "gathered": parallel.gather([rank, rank + 10]),
        "first": f"{type(first).__name__}: {first}",
        "none": parallel.agree(None) is None,
    }
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def test_two_workers_agree_average_and_gather(tmp_path: Path) -> None:
    mp.spawn(take_part, (str(tmp_path),), nprocs=2)
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert one["mean"] == other["mean"] == 1.5
    assert (one["value"], other["value"]) == (1.0, 2.0)  # what was given is left alone
    assert one["gathered"] == [0, 10, 1, 11] and other["gathered"] is None
    assert one["first"] == other["first"] == "InputError: worker 1 found it"
    assert one["none"] and other["none"]
    assert one["finite"] and other["finite"]
    assert not one["not finite"] and not other["not finite"]
    assert one["from first"] == other["from first"] == "worker 0"


def test_one_worker_needs_nobody() -> None:
    error = InputError("here")
    assert parallel.agree(error) is error and parallel.agree(None) is None
    assert parallel.mean(torch.tensor(3.0)).item() == 3.0
    assert parallel.gather([1, 2]) == [1, 2]
    assert parallel.from_first("here") == "here"
    assert parallel.all_finite(torch.tensor(3.0))
    assert not parallel.all_finite(torch.tensor(float("nan")))


def test_the_precision_of_a_forward_pass() -> None:
    weight = torch.ones(2, 2)
    device = torch.device("cpu")
    with parallel.autocast(device, "bf16"):
        assert (weight @ weight).dtype == torch.bfloat16
    with parallel.autocast(device, "fp32"):
        assert (weight @ weight).dtype == torch.float32
