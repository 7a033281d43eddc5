"""The published network, sampler and loss, number by number."""

from __future__ import annotations

import pytest
import torch

from dim.model import flow, sampler

NETWORK = 1e-5  # absolute; outputs are about 3
SAMPLE = 2e-4  # relative


def test_the_connector_gives_the_published_condition(golden):
    condition = golden.connector(golden.io["hidden_states"])
    torch.testing.assert_close(condition, golden.io["condition"], atol=NETWORK, rtol=0)


@pytest.mark.parametrize("timestep", ["1", "250", "500", "937", "937.6", "999"])
def test_the_network_gives_the_published_velocity(golden, timestep):
    with torch.no_grad():
        velocity = golden.painter(
            golden.io["noisy_latent"],
            float(timestep),
            golden.io["condition"],
            golden.io["mask"],
            golden.source,
        )
    torch.testing.assert_close(velocity, golden.io[f"out_t{timestep}"], atol=NETWORK, rtol=0)


def test_a_fraction_of_a_timestep_counts_only_when_asked_for(golden):
    inputs = (golden.io["noisy_latent"], 937.6, golden.io["condition"], golden.io["mask"])
    golden.painter.integer_timesteps = False
    try:
        with torch.no_grad():
            continuous = golden.painter(*inputs, golden.source)
    finally:
        golden.painter.integer_timesteps = True
    assert (continuous - golden.io["out_t937.6"]).abs().max() > 1e-2


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("guidance_scale", ["1.0", "4.5", "7.5"])
def test_the_sampler_gives_the_published_latent(golden, guidance_scale, row):
    only = slice(row, row + 1)
    latent = sampler.sample(
        golden.painter,
        golden.io["noisy_latent"][only],
        golden.io["condition"][only],
        golden.io["mask"][only],
        source_latent=None if golden.source is None else golden.source[only],
        steps=6,
        guidance_scale=float(guidance_scale),
    )
    published = golden.io[f"sample_cfg{guidance_scale}_row{row}"]
    assert (latent - published).norm() / published.norm() < SAMPLE
    assert (latent - published).abs().max() / published.abs().max() < SAMPLE


def test_rows_sampled_together_with_their_own_guidance_are_the_published_ones(golden):
    latent = sampler.sample(
        golden.painter,
        golden.io["noisy_latent"],
        golden.io["condition"],
        golden.io["mask"],
        source_latent=golden.source,
        steps=6,
        guidance_scale=[7.5, 1.0],
    )
    published = [golden.io["sample_cfg7.5_row0"], golden.io["sample_cfg1.0_row1"]]
    torch.testing.assert_close(latent, torch.cat(published), atol=1e-3, rtol=0)


def test_the_tables_are_the_published_ones(golden):
    schedule = flow.FlowSchedule()
    torch.testing.assert_close(schedule.sigmas, golden.loss["sigmas"], atol=1e-12, rtol=0)
    # 1e-12 would let 249.99999999999994 pass as 250, which the network tells apart
    assert torch.equal(schedule.timesteps, golden.loss["timestep_map"])


@pytest.mark.parametrize("index", [0, 100, 500, 900, 999])
def test_noising_and_the_loss_are_the_published_ones(golden, index):
    indices = torch.tensor([index, index])
    noisy = flow.FlowSchedule().add_noise(golden.loss["x0"], golden.loss["noise"], indices)
    torch.testing.assert_close(noisy, golden.loss[f"xt_i{index}"], atol=1e-6, rtol=0)
    with torch.no_grad():
        losses = flow.loss(
            golden.painter,
            golden.loss["x0"],
            golden.loss["noise"],
            indices,
            golden.io["condition"],
            golden.io["mask"],
            source_latent=golden.source,
        )
    torch.testing.assert_close(losses, golden.loss[f"loss_i{index}"], rtol=1e-4, atol=0)
