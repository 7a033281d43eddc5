"""Our sampler against a plain loop over diffusers' own network: time and peak memory.

    python benchmarks/painter.py                                # the published widths
    python benchmarks/painter.py --heads 7 --tokens 64 --side 8 # seconds, to see that it runs

Both start from the same weights, noise, condition and source and take the same steps at the same
guidance. The plain loop does what ``SanaPipeline.__call__`` does: latents doubled, captions
projected in every step for both branches, ``SanaTransformer2DModel`` called as it is. Time is the
best of several alternating runs in this process; peak memory is the largest resident size of a
process of its own, the smallest of as many, for one of them is 4 % off either way. Leaves with
status 1 when our sampler is less than ``--target`` times as fast, or its peak is the higher one.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DPMSolverMultistepScheduler, SanaTransformer2DModel
from torch import Tensor

from dim.model import sampler
from dim.model.painter import Painter, random_null_condition

CONDITION_FEATURES = 2304
LATENT_CHANNELS = 32
HEAD, CROSS_HEAD = 32, 112  # features of a head in self- and in cross-attention
GUIDANCE = 7.5
SHIFT = 3.0
# The two differ by the epsilon of the query and key norms, which diffusers sets ten times larger.
SAME = {"float32": 1e-2, "bfloat16": 1e-1}
KIB = 1024  # Linux counts resident memory in KiB
MIB = 1 << 20


@dataclass(frozen=True)
class Task:
    """What is sampled: weights, and the inputs of a batch of edits."""

    painter: Painter
    noise: Tensor
    condition: Tensor
    mask: Tensor
    source_latent: Tensor
    steps: int


def main() -> int:
    """Run the comparison, or one variant in a child process; returns the exit status."""
    options = _options()
    torch.set_num_threads(options.threads)
    torch.set_grad_enabled(False)
    if options.only is not None:
        VARIANTS[options.only](_task(options))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB)
        return 0
    # Memory first: the children then do not share the machine with this process's weights.
    rounds = [{name: _peak_of_child(name) for name in VARIANTS} for _ in range(options.repeats)]
    peaks = {name: min(each[name] for each in rounds) for name in VARIANTS}
    seconds, difference = _compare(_task(options), options.repeats)
    return _report(options, seconds, peaks, difference)


def ours(task: Task) -> Tensor:
    """The latent by our sampler."""
    return sampler.sample(
        task.painter,
        task.noise,
        task.condition,
        task.mask,
        source_latent=task.source_latent,
        steps=task.steps,
        guidance_scale=GUIDANCE,
        shift=SHIFT,
    )


def plain(task: Task) -> Tensor:
    """The latent by SANA's pipeline loop over diffusers' own network."""
    network = _untouched(task.painter.network)
    null = task.painter.null(task.condition.shape[1]).expand_as(task.condition)
    condition = torch.cat([null, task.condition])
    mask = torch.cat([task.mask, task.mask])
    source = torch.cat([task.source_latent, task.source_latent])
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=SHIFT
    )
    scheduler.set_timesteps(task.steps)
    latents = task.noise
    for timestep in scheduler.timesteps:
        both = torch.cat([torch.cat([latents, latents]), source], dim=1)
        velocity = network(
            both.to(network.dtype),
            encoder_hidden_states=condition.to(network.dtype),
            encoder_attention_mask=mask,
            timestep=timestep.expand(len(both)),
            return_dict=False,
        )[0].float()
        null_velocity, told = velocity.chunk(2)
        velocity = null_velocity + GUIDANCE * (told - null_velocity)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


VARIANTS: dict[str, Callable[[Task], Tensor]] = {"plain": plain, "ours": ours}


def _untouched(network: SanaTransformer2DModel) -> SanaTransformer2DModel:
    """The network as diffusers makes it, over the same weights."""
    with torch.device("meta"):
        copy = SanaTransformer2DModel(**network.config)
    copy.load_state_dict(network.state_dict(), assign=True)
    return copy.eval()


def _task(options: argparse.Namespace) -> Task:
    torch.manual_seed(0)
    network = SanaTransformer2DModel(
        in_channels=2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=options.layers,
        num_attention_heads=options.heads,
        attention_head_dim=HEAD,
        num_cross_attention_heads=HEAD * options.heads // CROSS_HEAD,
        cross_attention_head_dim=CROSS_HEAD,
        cross_attention_dim=HEAD * options.heads,
        caption_channels=CONDITION_FEATURES,
        qk_norm="rms_norm_across_heads",
    )
    painter = Painter(network, random_null_condition(options.tokens, CONDITION_FEATURES)).eval()
    dtype = getattr(torch, options.dtype)
    painter.to(dtype, memory_format=torch.channels_last if options.channels_last else None)
    if options.compile:
        painter.compile_blocks()
    latent = (options.batch, LATENT_CHANNELS, options.side, options.side)
    return Task(
        painter,
        noise=torch.randn(latent),
        condition=torch.randn(options.batch, options.tokens, CONDITION_FEATURES).to(dtype),
        mask=torch.ones(options.batch, options.tokens, dtype=torch.bool),
        source_latent=torch.randn(latent),
        steps=options.steps,
    )


def _compare(task: Task, repeats: int) -> tuple[dict[str, float], float]:
    """Best seconds of each variant, and how far their latents are apart (relative)."""
    seconds = dict.fromkeys(VARIANTS, float("inf"))
    latents: dict[str, Tensor] = {}
    for name, run in VARIANTS.items():  # once for the allocator, the kernels and the comparison
        latents[name] = run(task)
    for _ in range(repeats):
        for name, run in VARIANTS.items():
            start = time.perf_counter()
            run(task)
            seconds[name] = min(seconds[name], time.perf_counter() - start)
    apart = (latents["ours"] - latents["plain"]).norm() / latents["plain"].norm()
    return seconds, float(apart)


def _peak_of_child(name: str) -> int:
    """Bytes that one run of a variant holds at most, weights and libraries included."""
    # Two steps: the second keeps the first one's velocity, and no later step holds more.
    command = [sys.executable, __file__, *sys.argv[1:], "--only", name, "--steps", "2"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    return int(done.stdout.split()[-1])


def _report(
    options: argparse.Namespace,
    seconds: dict[str, float],
    peaks: dict[str, int],
    difference: float,
) -> int:
    print(
        f"hidden {HEAD * options.heads}, {options.layers} layers, "
        f"{options.tokens} condition tokens, "
        f"latent {options.side}x{options.side}, batch {options.batch}, {options.steps} steps, "
        f"{options.dtype}, {options.threads} threads, best of {options.repeats}"
    )
    for name in VARIANTS:
        print(f"{name:5}  {seconds[name]:9.3f} s   peak {peaks[name] / MIB:9.1f} MiB")
    ratio = seconds["plain"] / seconds["ours"]
    print(f"speed ratio {ratio:.2f} (at least {options.target:g} wanted)")
    print(f"peak memory ratio {peaks['ours'] / peaks['plain']:.3f} (at most 1 wanted)")
    print(f"latents differ by {difference:.1e} (relative)")
    failures = [
        said
        for failed, said in (
            (ratio < options.target, "ours is not fast enough"),
            (peaks["ours"] > peaks["plain"], "ours needs more memory"),
            (difference > SAME[options.dtype], "the latents are not the same"),
        )
        if failed
    ]
    for said in failures:
        print(f"FAILED: {said}", file=sys.stderr)
    return 1 if failures else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--heads", type=int, default=70, help="of 32 features each; sevenfold")
    parser.add_argument("--layers", type=int, default=2, help="blocks; the published network: 20")
    parser.add_argument("--tokens", type=int, default=1720, help="condition tokens of an image")
    parser.add_argument("--side", type=int, default=32, help="latent cells along a side")
    parser.add_argument("--batch", type=int, default=1, help="images at once")
    parser.add_argument("--steps", type=int, default=6, help="sampler steps")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each kind; the best counts")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile our blocks")
    parser.add_argument("--channels-last", action="store_true", help="weights of both")
    parser.add_argument("--target", type=float, default=1.3, help="speed ratio that is wanted")
    parser.add_argument("--only", choices=("plain", "ours"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.heads < 1 or HEAD * options.heads % CROSS_HEAD:
        parser.error("--heads: only a multiple of 7 divides into heads of cross-attention too")
    return options


if __name__ == "__main__":
    sys.exit(main())
