"""What makes painting or training faster or smaller, held to the plain numbers.

The tolerances are those that ``docs/model.md`` states.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.attention import SDPBackend, sdpa_kernel

from dim import model
from dim.model import block, sampler

EXACT = {"atol": 1e-5, "rtol": 0}
BF16 = 2e-2  # relative: bfloat16 keeps 8 bits of a number


def velocity(painter, batch):
    """The training pass, with its gradients left on the parameters."""
    painter.zero_grad()
    out = painter(batch["latent"], 400.0, batch["condition"], batch["mask"])
    out.square().mean().backward()
    return out.detach()


def sample(painter, batch):
    return sampler.sample(
        painter, batch["latent"], batch["condition"], batch["mask"], steps=3, guidance_scale=3.0
    )


# aot_eager traces, functionalises and runs the very graph that inductor would lower, in seconds.
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_blocks_give_the_same_numbers(painter, batch, backend):
    torch._dynamo.reset()  # of what was compiled in other tests
    shorter = {**batch, "condition": batch["condition"][:, :6], "mask": batch["mask"][:, :6]}
    short, latent = velocity(painter, shorter), sample(painter, batch)
    plain = velocity(painter, batch)
    gradient = painter.blocks[0].ff.conv_point.weight.grad.clone()
    compiled = copy.deepcopy(painter)
    compiled.compile_blocks(backend=backend, fullgraph=True)
    for given, wanted in ((batch, plain), (shorter, short)):  # and then the first length again
        torch.testing.assert_close(velocity(compiled, given), wanted, **EXACT)
    torch.testing.assert_close(sample(compiled, batch), latent, atol=1e-4, rtol=0)
    torch.testing.assert_close(velocity(compiled, batch), plain, **EXACT)
    torch.testing.assert_close(compiled.blocks[0].ff.conv_point.weight.grad, gradient, **EXACT)
    assert compiled.state_dict().keys() == painter.state_dict().keys()


@torch.no_grad()
def test_bfloat16_is_as_near_as_its_bits_allow(painter, batch):
    half = copy.deepcopy(painter).bfloat16()
    inputs = (batch["latent"], 400.0, batch["condition"], batch["mask"])
    plain, rough = painter(*inputs), half(*inputs)
    assert rough.dtype == torch.float32
    assert (rough - plain).norm() / plain.norm() < BF16
    prepared = half.prepare(batch["condition"], batch["mask"])
    quick = half(batch["latent"], 400.0, prepared)
    assert (quick - plain).norm() / plain.norm() < BF16


def test_channels_last_gives_the_same_numbers(painter, batch):
    plain, latent = velocity(painter, batch), sample(painter, batch)
    painter.to(memory_format=torch.channels_last)
    weight = painter.blocks[0].ff.conv_depth.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(velocity(painter, batch), plain, **EXACT)
    torch.testing.assert_close(sample(painter, batch), latent, atol=1e-4, rtol=0)


def test_every_attention_kernel_gives_the_same_numbers(painter, batch):
    """A mask, or none: torch may choose any kernel that the device has."""
    for mask in (batch["mask"], None):
        given = {**batch, "mask": mask}
        chosen = sample(painter, given)
        with sdpa_kernel(SDPBackend.MATH):
            torch.testing.assert_close(sample(painter, given), chosen, atol=1e-4, rtol=0)


def test_wide_states_in_pieces_are_the_same(painter, batch, monkeypatch):
    whole = sample(painter, batch)
    pieces = []
    gated = block._gated
    monkeypatch.setattr(
        block, "_gated", lambda f, cells: pieces.append(len(cells)) or gated(f, cells)
    )
    monkeypatch.setattr(block, "WIDE_NUMBERS", 1)
    torch.testing.assert_close(sample(painter, batch), whole, **EXACT)
    assert set(pieces) == {1}


def test_self_attention_before_branches_differ_is_computed_once(painter, batch):
    rows = []
    for part in painter.blocks:
        part.attn1.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    prepared = painter.prepare(torch.cat([batch["condition"]] * 2), branches=2)
    painter(batch["latent"], 400.0, prepared)
    assert rows == [2, 4]


@pytest.fixture
def one_process(tmp_path):
    """A process group of one, for what needs one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_blocks_are_what_to_shard(painter, batch, one_process):
    plain = velocity(painter, batch)
    names = [name for name, p in painter.named_parameters() if p.grad is not None]
    gradients = [p.grad.clone() for p in painter.parameters() if p.grad is not None]
    sharded = copy.deepcopy(painter)
    sharded.checkpoint_gradients()
    sharded.train()
    for part in sharded.blocks:
        fully_shard(part, mesh=one_process)
    fully_shard(sharded, mesh=one_process)
    assert all(isinstance(part, FSDPModule) for part in sharded.blocks)
    torch.testing.assert_close(velocity(sharded, batch), plain, **EXACT)
    trained = dict(sharded.named_parameters())
    for name, gradient in zip(names, gradients, strict=True):
        torch.testing.assert_close(trained[name].grad.full_tensor(), gradient, **EXACT)


def test_a_model_that_was_sped_up_paints_and_saves_the_same(tiny, tiny_config, photos, tmp_path):
    expected = tiny.edit(photos[:1], ["remove it"])[0].image
    quick = model.build(tiny_config, seed=0).speed_up(channels_last=True)
    weight = next(p for p in quick.autoencoder.parameters() if p.ndim == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)

    def apart(dim):
        painted = dim.edit(photos[:1], ["remove it"])[0].image
        return np.abs(np.asarray(painted, int) - np.asarray(expected, int)).max()

    assert apart(quick) <= 1
    quick.save(tmp_path / "model")
    assert apart(model.load(tmp_path / "model")) <= 1


def test_speeding_up_can_compile(tiny_config, monkeypatch):
    dim = model.build(tiny_config, seed=0)
    compiled = []
    monkeypatch.setattr(dim.painter, "compile_blocks", lambda: compiled.append(True))
    assert dim.speed_up() is dim and not compiled
    dim.speed_up(compile=True)
    assert compiled == [True]
