"""Steps that reuse what the later blocks added: near the whole ones, and the same in a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dim.errors import InputError
from dim.model import DIM, sampler
from dim.model.continuous import ContinuousBatch, begin
from dim.model.painter import Painter
from dim.model.sampler import Condition
from dim.model.step_cache import StepCache

THRESHOLD = 0.2
STEPS = 12


@pytest.fixture
def editor(painter: Painter) -> Painter:
    painter.widen()
    torch.nn.init.normal_(painter.network.patch_embed.proj.weight, std=0.3)
    return painter


def told(seed: int, tokens: int = 5) -> torch.Tensor:
    return torch.randn(1, tokens, 24, generator=torch.Generator().manual_seed(seed))


def noise(seed: int) -> torch.Tensor:
    return torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(100 + seed))


def sampled(editor: Painter, seed: int, threshold: float, **more: Any) -> torch.Tensor:
    settings: dict[str, Any] = {"guidance_scale": 1.0 + seed % 3, "steps": STEPS, **more}
    condition = told(seed, 3 + seed)
    return sampler.sample(editor, noise(seed), condition, None, step_cache=threshold, **settings)


def blocks_run(editor: Painter, work: Any) -> int:
    """How many rows went through the last block during ``work``."""
    rows = 0

    def count(_: Any, given: tuple[torch.Tensor, ...], __: Any) -> None:
        nonlocal rows
        rows += len(given[0])

    hook = editor.blocks[-1].attn2.register_forward_hook(count)
    try:
        work()
    finally:
        hook.remove()
    return rows


def test_fewer_blocks_are_computed_and_little_changes(editor: Painter) -> None:
    whole = blocks_run(editor, lambda: sampled(editor, 0, 0.0))
    some = blocks_run(editor, lambda: sampled(editor, 0, THRESHOLD))
    assert whole == STEPS and 0 < some < whole
    exact = sampled(editor, 0, 0.0)
    near, far = (
        float((sampled(editor, 0, threshold) - exact).abs().mean()) for threshold in (0.05, 0.9)
    )
    assert near <= far and far > 0


def test_a_threshold_that_nothing_is_below_changes_no_bit(editor: Painter) -> None:
    for seed in range(3):
        assert torch.equal(sampled(editor, seed, 1e-9), sampled(editor, seed, 0.0))


def test_in_a_batch_each_is_the_same_to_the_bit_as_alone(editor: Painter) -> None:
    """Rows of a pass take whole and short steps beside each other."""
    rows = [
        begin(
            editor,
            noise(seed),
            Condition(told(seed, 3 + seed), None),
            steps=STEPS,
            guidance_scale=1.0 + seed % 3,
            step_cache=THRESHOLD if seed != 2 else 0.0,
        )
        for seed in range(5)
    ]
    batch = ContinuousBatch(editor)
    for late, row in enumerate(rows):
        batch.join(row)
        if late % 2:
            batch.step()
    while not all(row.done for row in rows):
        assert not batch.step()
    for seed, row in enumerate(rows):
        assert torch.equal(row.latent, sampled(editor, seed, THRESHOLD if seed != 2 else 0.0))
    kinds = [(row.cache.whole, row.cache.short) for row in rows if row.cache is not None]
    assert all(whole + short == STEPS and short for whole, short in kinds)
    assert len(set(kinds)) > 1


def test_a_call_of_several_images_is_as_of_one(editor: Painter) -> None:
    together = sampler.sample(
        editor,
        torch.cat([noise(seed) for seed in range(3)]),
        torch.cat([told(seed) for seed in range(3)]),
        None,
        steps=STEPS,
        guidance_scale=[3.0, 4.0, 2.0],
        step_cache=THRESHOLD,
    )
    for seed, scale in enumerate((3.0, 4.0, 2.0)):
        alone = sampler.sample(
            editor, noise(seed), told(seed), None,
            steps=STEPS, guidance_scale=scale, step_cache=THRESHOLD,
        )  # fmt: skip
        assert torch.equal(together[seed : seed + 1], alone)


def test_the_same_again_begins_with_an_empty_cache(editor: Painter) -> None:
    row = begin(editor, noise(1), Condition(told(1), None), steps=3, step_cache=THRESHOLD)
    row.cache.keep(torch.ones(2, 4, 4), torch.ones(2, 4, 4))  # type: ignore[union-attr]
    again = row.again(noise(2))
    assert again.cache is not None and again.cache.whole == 0
    assert again.cache.change(torch.zeros(2, 4, 4)) == torch.inf


def test_how_far_a_contribution_has_changed() -> None:
    cache = StepCache(0.5)
    cache.keep(torch.full((1, 2, 2), 2.0), torch.zeros(1, 2, 2))
    assert float(cache.change(torch.full((1, 2, 2), 2.5))) == pytest.approx(0.25)


def test_a_model_is_told_once_and_paints_so_both_ways(tiny: DIM) -> None:
    plain = tiny.config
    try:
        tiny.speed_up(step_cache=0.5)
        (image,) = tiny.generate(["a cup"], seeds=[3], steps=6)
        painting = tiny.begin_generation("a cup", seed=3, steps=6)
        assert painting.denoising.cache is not None
        batch = ContinuousBatch(tiny.painter)
        batch.join(painting.denoising)
        while not painting.denoising.done:
            batch.step()
        assert image.tobytes() == painting.image().tobytes()
        assert painting.denoising.cache.short
    finally:
        tiny.config = plain
    with pytest.raises(InputError, match="threshold is from 0 to 1, not 2"):
        tiny.speed_up(step_cache=2)
    with pytest.raises(InputError, match="does not go with adapters"):
        begin(tiny.painter, noise(0), Condition(told(0), None), step_cache=0.1, adapter="a")
