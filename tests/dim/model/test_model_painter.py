from __future__ import annotations

import copy

import pytest
import torch
from diffusers import SanaTransformer2DModel

from dim.errors import InputError
from dim.model import flow, sampler
from dim.model.connector import Connector
from dim.model.painter import Painter, random_null_condition


def test_widening_changes_nothing_until_the_source_is_learnt(painter, batch):
    inputs = (batch["latent"], 500.0, batch["condition"], batch["mask"])
    before = painter(*inputs)
    narrow = painter.network.patch_embed.proj.weight.detach().clone()
    painter.widen()
    assert painter.takes_source and painter.network.config.in_channels == 8
    assert torch.equal(painter.network.patch_embed.proj.weight[:, :4], narrow)
    assert not painter.network.patch_embed.proj.weight[:, 4:].any()
    torch.testing.assert_close(painter(*inputs, batch["source"]), before)

    painter(*inputs, batch["source"]).square().mean().backward()
    assert painter.network.patch_embed.proj.weight.grad[:, 4:].any()
    with pytest.raises(InputError, match="already"):
        painter.widen()


def test_the_source_comes_second_and_is_zero_when_absent(painter, batch):
    painter.widen()
    torch.nn.init.normal_(painter.network.patch_embed.proj.weight)
    seen = []
    painter.network.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    painter(batch["latent"], 1.0, batch["condition"], batch["mask"], batch["source"])
    painter(batch["latent"], 1.0, batch["condition"], batch["mask"])
    assert torch.equal(seen[0], torch.cat([batch["latent"], batch["source"]], dim=1))
    assert torch.equal(seen[1][:, 4:], torch.zeros_like(batch["source"]))


def test_masked_tokens_change_nothing(painter, batch):
    condition = batch["condition"].clone()
    condition[1, 5:] = 1e3
    whole = painter(batch["latent"], 3.0, condition, batch["mask"])
    alone = painter(batch["latent"][1:], 3.0, batch["condition"][1:, :5])
    torch.testing.assert_close(whole[1:], alone, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [True, False])
def test_a_prepared_condition_gives_the_same_velocity(painter, batch, masked):
    painter.widen()
    torch.nn.init.normal_(painter.network.patch_embed.proj.weight)
    mask = batch["mask"] if masked else None
    plain = painter(batch["latent"], 300.0, batch["condition"], mask, batch["source"])
    prepared = painter.prepare(batch["condition"], mask)
    quick = painter(batch["latent"], 300.0, prepared, source_latent=batch["source"])
    torch.testing.assert_close(quick, plain, atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="prepared for 2 rows, not 1"):
        painter(batch["latent"][:1], 300.0, prepared)


def test_branches_are_painted_from_one_latent(painter, batch):
    told, mask = batch["condition"], batch["mask"]
    other = told.flip(1)
    prepared = painter.prepare(torch.cat([other, told]), torch.cat([mask, mask]), branches=2)
    both = painter(batch["latent"], 300.0, prepared)
    alone = [painter(batch["latent"], 300.0, one, mask) for one in (other, told)]
    torch.testing.assert_close(both, torch.cat(alone), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="3 conditions do not make 2 branches"):
        painter.prepare(torch.zeros(3, 9, 24), branches=2)


def test_a_timestep_may_be_one_or_one_a_row_and_loses_its_fraction(painter, batch):
    rest = (batch["condition"], batch["mask"])
    one = painter(batch["latent"], 249.99999999999994, *rest)
    assert torch.equal(one, painter(batch["latent"], torch.tensor([249, 249]), *rest))
    assert not torch.equal(one, painter(batch["latent"], 250.0, *rest))


def test_dropped_rows_are_the_null_tables_first_ones_and_train_it(painter, batch):
    dropped = painter.drop_condition(batch["condition"], torch.tensor([False, True]))
    assert torch.equal(dropped[0], batch["condition"][0])
    assert torch.equal(dropped[1], painter.null_condition[:9])
    dropped.sum().backward()
    assert painter.null_condition.grad[:9].all() and not painter.null_condition.grad[9:].any()


def test_the_null_table_grows_and_shrinks_keeping_its_first_rows(painter, batch):
    rows = painter.null_condition.detach().clone()
    painter.resize_null_condition(20)
    assert painter.null_condition.shape == (20, 24)
    assert torch.equal(painter.null_condition[:12], rows)
    painter.resize_null_condition(5)
    assert torch.equal(painter.null_condition, rows[:5])
    with pytest.raises(InputError, match="9 tokens needs as many rows .* has 5"):
        painter.drop_condition(batch["condition"], torch.tensor([True, True]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.zeros(2, 3, 4, 4)}, r"noisy latent must be \(B, 4, h, w\)"),
        ({"condition": torch.zeros(2, 9, 8)}, r"condition must be \(2, N, 24\)"),
        ({"condition": torch.zeros(1, 9, 24)}, r"condition must be \(2, N, 24\)"),
        ({"mask": torch.ones(2, 8)}, r"mask must be \(2, 9\)"),
        ({"source": torch.zeros(2, 4, 3, 5)}, "takes no source latent"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(painter, batch, change, message):
    batch = {**batch, "source": None, **change}
    with pytest.raises(InputError, match=message):
        painter(batch["latent"], 1.0, batch["condition"], batch["mask"], batch["source"])


def test_a_source_of_another_size_is_refused(painter, batch):
    painter.widen()
    with pytest.raises(InputError, match="source latent must be"):
        painter(batch["latent"], 1.0, batch["condition"], batch["mask"], batch["source"][..., :2])


def test_channels_that_are_neither_task_are_refused(painter):
    network = SanaTransformer2DModel.from_config(painter.network.config, in_channels=6)
    with pytest.raises(InputError, match="6 for 4"):
        Painter(network, random_null_condition(4, 24))
    with pytest.raises(InputError, match="null table"):
        Painter(painter.network, torch.zeros(4, 8))


def test_the_connector_refuses_other_features():
    connector = Connector(6, 3)
    assert connector(torch.zeros(2, 5, 6)).shape == (2, 5, 3)
    with pytest.raises(InputError, match="takes 6 features a token, not 7"):
        connector(torch.zeros(2, 5, 7))


def test_levels_are_drawn_as_published():
    index = flow.noise_levels(torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
    assert index.min() >= 0 and index.max() <= 999
    # the sigmoid of a normal has median 1/2 and quartiles at sigmoid(±0.6745)
    quartiles = torch.quantile(index.float(), torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([337.5, 500.0, 662.5]), atol=8, rtol=0)


def test_a_shift_moves_levels_towards_noise():
    assert float(flow.FlowSchedule(3.0).sigmas[500]) == pytest.approx(0.75)
    assert float(flow.FlowSchedule(1.0).sigmas[500]) == pytest.approx(0.5)


def test_a_weight_picks_the_cells_that_count(batch):
    x0, noise = batch["latent"], batch["source"]
    index = torch.tensor([100, 900])

    def half_right(noisy, timestep, condition, mask, source_latent):
        velocity = noise - x0
        velocity[..., 3:] += 1
        return velocity

    def losses(weight):
        rest = (batch["condition"], batch["mask"])
        return flow.loss(half_right, x0, noise, index, *rest, weight=weight)

    right, wrong = torch.ones(2, 1, 3, 5), torch.zeros(2, 1, 3, 5)
    right[..., 3:], wrong[..., 3:] = 0, 1
    torch.testing.assert_close(losses(None), torch.full((2,), 0.4))
    torch.testing.assert_close(losses(7 * torch.ones(2, 1, 3, 5)), torch.full((2,), 0.4))
    torch.testing.assert_close(losses(right), torch.zeros(2))
    torch.testing.assert_close(losses(wrong), torch.ones(2))


@pytest.mark.parametrize("index", [[0], [0, 1000], [-1, 5]])
def test_levels_out_of_the_table_are_refused(batch, index):
    with pytest.raises(InputError, match="index must hold 2 numbers from 0 to 999"):
        flow.FlowSchedule().add_noise(batch["latent"], batch["source"], torch.tensor(index))


def test_samples_do_not_depend_on_neighbours_and_steps_are_reported(painter, batch):
    steps = []
    latent = sampler.sample(
        painter,
        batch["latent"],
        batch["condition"],
        batch["mask"],
        steps=4,
        guidance_scale=[2.0, 5.0],
        on_step=steps.append,
    )
    assert [step.number for step in steps] == [0, 1, 2, 3]
    assert torch.equal(steps[-1].latent, latent)
    alone = sampler.sample(
        painter,
        batch["latent"][1:],
        batch["condition"][1:, :5],
        None,
        steps=4,
        guidance_scale=5.0,
    )
    torch.testing.assert_close(latent[1:], alone, atol=1e-4, rtol=0)


def test_without_guidance_the_null_branch_costs_nothing(painter, batch):
    rows = []
    painter.network.proj_out.register_forward_pre_hook(lambda _, a: rows.append(len(a[0])))
    rest = (batch["latent"], batch["condition"], batch["mask"])
    sampler.sample(painter, *rest, steps=2, guidance_scale=1.0)
    sampler.sample(painter, *rest, steps=2, guidance_scale=[1.0, 3.0])
    assert rows == [2, 2, 4, 4]


def test_gradient_checkpointing_gives_the_same_gradients(painter, batch):
    other = copy.deepcopy(painter)
    other.checkpoint_gradients()
    assert other.network.is_gradient_checkpointing
    for module in (painter, other):
        module.train()
        module(batch["latent"], 9.0, batch["condition"], batch["mask"]).square().sum().backward()
    for plain, checkpointed in zip(painter.parameters(), other.parameters(), strict=True):
        if plain.grad is not None:
            torch.testing.assert_close(checkpointed.grad, plain.grad)
    other.checkpoint_gradients(False)
    assert not other.network.is_gradient_checkpointing
