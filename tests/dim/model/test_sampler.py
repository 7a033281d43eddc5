"""Solvers, guidance, negative conditions and callbacks of the sampler."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from dim.errors import InputError
from dim.model import sampler
from dim.model.sampler import Step


class Right(torch.nn.Module):
    """A painter that always knows the velocity."""

    def __init__(self, velocity: torch.Tensor) -> None:
        super().__init__()
        self.velocity = velocity

    def prepare(self, condition, mask, *, branches):
        assert branches == 1
        return condition

    def forward(self, *_, **__):
        return self.velocity


@pytest.mark.parametrize("solver", ["dpm", "euler"])
@pytest.mark.parametrize("steps", [1, 7, 20, 600])
def test_a_velocity_that_is_right_leads_to_the_image(batch, solver, steps):
    x0, noise = batch["latent"], batch["source"]
    seen: list[Step] = []
    latent = sampler.sample(
        Right(noise - x0),
        noise,
        batch["condition"],
        None,
        steps=steps,
        guidance_scale=1,
        solver=solver,
        on_step=seen.append,
    )
    # DPM-Solver++ starts at σ = 0.9997 and takes the noise for what is there.
    torch.testing.assert_close(latent, x0, atol=2e-3, rtol=0)
    assert [step.number for step in seen] == list(range(steps))
    assert torch.equal(seen[-1].latent, latent)
    # whoever knows the velocity knows the image from the first step on
    for step in seen:
        torch.testing.assert_close(step.estimate, x0, atol=2e-3, rtol=0)


@torch.no_grad()
def guided_by_hand(painter, scheduler, batch, scale):
    """Both branches in passes of their own, nothing prepared: (B, C, h, w)."""
    null = painter.null(batch["condition"].shape[1]).expand_as(batch["condition"])
    latent = batch["latent"]
    for timestep in scheduler.timesteps:
        told = painter(latent, timestep, batch["condition"], batch["mask"])
        away = painter(latent, timestep, null, batch["mask"])
        velocity = away + scale * (told - away)
        latent = scheduler.step(velocity, timestep, latent, return_dict=False)[0]
    return latent


def test_euler_is_diffusers_own(painter, batch):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    expected = guided_by_hand(painter, scheduler, batch, 4.0)
    latent = sample(painter, batch, solver="euler", steps=5, guidance_scale=4.0)
    torch.testing.assert_close(latent, expected, atol=1e-4, rtol=0)
    other = sample(painter, batch, steps=5, guidance_scale=4.0)
    assert (other - latent).abs().max() > 1e-3


def test_dpm_is_two_branches_under_diffusers_scheduler(painter, batch):
    scheduler = sampler.make_scheduler("dpm", 5, 3.0)
    expected = guided_by_hand(painter, scheduler, batch, 4.0)
    latent = sample(painter, batch, steps=5, guidance_scale=4.0)
    torch.testing.assert_close(latent, expected, atol=1e-4, rtol=0)


def sample(painter, batch, **options):
    options = {"steps": 3, "guidance_scale": 5.0, **options}
    return sampler.sample(painter, batch["latent"], batch["condition"], batch["mask"], **options)


def test_the_null_condition_as_a_negative_one_changes_nothing(painter, batch):
    null = painter.null(9).expand_as(batch["condition"]).detach()
    plain = sample(painter, batch)
    same = sample(painter, batch, negative_condition=null, negative_mask=batch["mask"])
    torch.testing.assert_close(same, plain, atol=1e-5, rtol=0)


def test_a_negative_condition_of_any_length_steers_only_its_row(painter, batch):
    negative = torch.randn(2, 11, 24, generator=torch.Generator().manual_seed(5))
    mask = torch.arange(11) < torch.tensor([[11], [0]])
    plain = sample(painter, batch)
    steered = sample(painter, batch, negative_condition=negative, negative_mask=mask)
    assert (steered[0] - plain[0]).abs().max() > 1e-2
    torch.testing.assert_close(steered[1], plain[1], atol=1e-4, rtol=0)
    alone = sampler.sample(
        painter,
        batch["latent"][:1],
        batch["condition"][:1],
        None,
        steps=3,
        guidance_scale=5.0,
        negative_condition=negative[:1],
    )
    torch.testing.assert_close(steered[:1], alone, atol=1e-4, rtol=0)


def test_without_guidance_a_negative_condition_is_nothing(painter, batch):
    negative = torch.randn(2, 4, 24)
    one = sample(painter, batch, guidance_scale=1.0, negative_condition=negative)
    assert torch.equal(one, sample(painter, batch, guidance_scale=1.0))


def test_what_a_callback_raises_ends_the_sampling(painter, batch):
    steps = []

    def stop(step: Step) -> None:
        steps.append(step.number)
        raise TimeoutError

    with pytest.raises(TimeoutError):
        sample(painter, batch, on_step=stop)
    assert steps == [0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "at least 1 step"),
        ({"guidance_scale": [1.0, 2.0, 3.0]}, "3 guidance scales were given for 2"),
        ({"solver": "heun"}, "'heun' is not one of dpm, euler"),
        ({"negative_condition": torch.zeros(1, 4, 24)}, "1 negative conditions .* for 2 samples"),
    ],
)
def test_impossible_sampling_is_refused(painter, batch, options, message):
    with pytest.raises(InputError, match=message):
        sample(painter, batch, **options)
