"""Training and painting at the published sizes on one GPU: a table, within ten minutes.

    python -m benchmarks.gpu                          # on a GPU
    python -m benchmarks.gpu --size tiny --seconds 1  # on any machine, to see that it runs
    python -m benchmarks.gpu --rows sampler LoRA      # some of the rows

Weights are random, in the shapes of DIM-4.6B at 1024 px; a step is forward pass, backward pass,
clipping and update of connector and painter under bf16 autocast. Needs no Ray, no data and no
download. Prints Markdown, a row as soon as it is measured. One that does not fit into memory says
so; rows for which no time is left are named at the end. Leaves with status 1 when a row fails in
any other way.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dim.config import load_config
from dim.devices import best_device
from dim.errors import DimError
from dim.gpus import named_gpu
from dim.learning.optimizer import OptimizerName, OptimizerSettings, make_optimizers
from dim.learning.step import Trainable
from dim.model import parts, sampler
from dim.model.config import ModelConfig
from dim.model.flow import FlowSchedule, noise_levels, squared_error
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings
from dim.model.painter import Painter

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

# What configs/dim-4.6b.yaml leaves to the weights: Qwen2.5-VL-3B and the DC-AE f32c32.
UNDERSTANDING: dict[str, Any] = {
    "tie_word_embeddings": True,
    "text_config": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128000,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24],
        },
    },
    "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
}  # fmt: skip
_BLOCKS = ["ResBlock"] * 3 + ["EfficientViTBlock"] * 3
_WIDTHS = [128, 256, 512, 512, 1024, 1024]
_SCALES: list[list[int]] = [[], [], [], [5], [5], [5]]
AUTOENCODER: dict[str, Any] = {
    "latent_channels": 32,
    "encoder_block_types": _BLOCKS,
    "decoder_block_types": _BLOCKS,
    "encoder_block_out_channels": _WIDTHS,
    "decoder_block_out_channels": _WIDTHS,
    "encoder_layers_per_block": [2, 2, 2, 3, 3, 3],
    "decoder_layers_per_block": [3, 3, 3, 3, 3, 3],
    "encoder_qkv_multiscales": _SCALES,
    "decoder_qkv_multiscales": _SCALES,
    "upsample_block_type": "interpolate",
    "downsample_block_type": "Conv",
    "scaling_factor": 0.41407,
}

WARM_UP = 2  # the first allocates and compiles, the second may compile for other strides
HEAD = "| row | ms | samples/s | TFLOP/s | MFU | peak memory | |"
RULE = "|---|---:|---:|---:|---:|---:|---|"


class Size(NamedTuple):
    """A model whose weights are all random, and the condition ``tokens`` of a sample."""

    config: ModelConfig
    tokens: int

    @property
    def cell(self) -> int:
        """Pixels along each side of a latent's cell."""
        widths = self.config.autoencoder.architecture["encoder_block_out_channels"]
        return int(2 ** (len(widths) - 1))

    @property
    def latent(self) -> tuple[int, int, int]:
        """The shape of a latent."""
        side = self.config.sampling.resolution // self.cell
        return int(self.config.autoencoder.architecture["latent_channels"]), side, side

    @property
    def hidden(self) -> int:
        """Features of a hidden state."""
        return int(self.config.understanding.architecture["text_config"]["hidden_size"])


@dataclass(frozen=True)
class Bench:
    """What every row is measured with. ``seconds`` is for the timed runs of a row."""

    size: Size
    device: torch.device
    batch: int
    repeats: int
    seconds: float
    steps: int  # of the sampler


@dataclass(frozen=True)
class Measured:
    """Of one run: its ``seconds``, ``samples`` and ``flops``; ``peak`` bytes, 0 if unknown."""

    seconds: float
    samples: int
    flops: float
    peak: int
    note: str = ""


class Row(NamedTuple):
    """A line of the table, measured by itself."""

    name: str
    measure: Callable[[Bench], Measured]


class Method(NamedTuple):
    """How connector and painter are trained. ``backward``: forward passes that one costs."""

    name: str
    optimizer: OptimizerName
    lora: LoraSettings | None
    backward: int


FULL = Method("full, AdamW", "adamw", None, 2)
EIGHT_BIT = Method("full, 8-bit AdamW", "adamw8bit", None, 2)
# Frozen weights want no gradients, the adapter's are a hundredth of the work.
LORA = Method("LoRA", "adamw", LoraSettings(), 1)


def main() -> int:
    """Print the table; returns the exit status."""
    options = _options()
    bench = Bench(
        size=make_size(options.size),
        device=torch.device(best_device()),
        batch=options.batch,
        repeats=options.repeats,
        seconds=options.seconds,
        steps=options.steps,
    )
    wanted = options.rows or [""]
    chosen = [row for row in every_row() if any(part in row.name for part in wanted)]
    print(introduction(options, bench), flush=True)
    return report(chosen, bench, 60 * options.minutes, options.peak * 1e12 or peak(bench.device))


def every_row() -> list[Row]:
    """All rows, the ones that tell most first: time may not suffice for the last."""
    plain, checkpointed = (
        [
            Row(_name(method, checkpointed=kept), partial(train, method, checkpointed=kept))
            for method in (FULL, LORA)
        ]
        for kept in (False, True)
    )
    compiled = [
        Row(
            _name(method, checkpointed=kept, compiled=True),
            partial(train, method, checkpointed=kept, compiled=True),
        )
        for kept in (False, True)
        for method in (FULL, LORA)
    ]
    online = [Row(f"{_name(m, checkpointed=True)}, features online", partial(train_online, m))
              for m in (FULL, LORA)]  # fmt: skip
    paint = [
        Row(
            f"sampler, batch {batch}{', compiled' if fast else ''}",
            partial(paint_batch, batch, compiled=fast),
        )
        for fast in (False, True)
        for batch in (1, 8)
    ]
    eight = Row(_name(EIGHT_BIT, checkpointed=True), partial(train, EIGHT_BIT, checkpointed=True))
    return [*checkpointed, *plain, *paint[:2], *online, *compiled, *paint[2:], eight]


def train(method: Method, bench: Bench, *, checkpointed: bool, compiled: bool = False) -> Measured:
    """A step on features that were made before."""
    step = TrainingStep(method, bench, checkpointed=checkpointed, compiled=compiled)
    seconds, held = timed(step.on_random_features, bench)
    return Measured(seconds, bench.batch, step.flops, held)


def train_online(method: Method, bench: Bench) -> Measured:
    """A step that begins with the frozen parts, and how much longer it takes."""
    frozen = OnlineFeatures(bench)
    step = TrainingStep(method, bench, checkpointed=True)
    work = step.flops + count(frozen.features)
    cached, _ = timed(step.on_random_features, bench)
    online, held = timed(lambda: step(*frozen.features()), bench)
    note = f"{online / cached:.1f} x the {1000 * cached:,.0f} ms with cached features"
    return Measured(online, bench.batch, work, held, note)


def paint_batch(batch: int, bench: Bench, *, compiled: bool) -> Measured:
    """From noise to latents, guided, in bfloat16; without the decoder."""
    painter = make_painter(bench).to(torch.bfloat16).eval()
    noise = torch.randn(batch, *bench.size.latent, device=bench.device)
    features = bench.size.config.connector.out_features
    condition = torch.randn(
        batch, bench.size.tokens, features, device=bench.device, dtype=torch.bfloat16
    )
    mask = torch.ones(batch, bench.size.tokens, dtype=torch.bool, device=bench.device)

    def paint(steps: int) -> Tensor:
        return sampler.sample(painter, noise, condition, mask, source_latent=noise, steps=steps)

    once, twice = count(partial(paint, 1)), count(partial(paint, 2))
    if compiled:
        painter.compile_blocks()
    seconds, held = timed(partial(paint, bench.steps), bench)
    return Measured(seconds, batch, once + (bench.steps - 1) * (twice - once), held)


class TrainingStep:
    """Connector and painter with their optimizer, and random features of a batch.

    Attributes:
        flops: of a step. The backward pass is reckoned from the forward one, since torch's counter
            takes that of a depthwise convolution for a full one's.
    """

    def __init__(
        self, method: Method, bench: Bench, *, checkpointed: bool, compiled: bool = False
    ) -> None:
        size, device, rows = bench.size, bench.device, bench.batch
        held = nn.Module()
        with device:
            held.connector = parts.connector(size.config.connector, size.hidden)
        held.painter = make_painter(bench)
        held.float().train()
        if method.lora is not None:
            layers.attach(held, method.lora, seed=0, frozen=torch.bfloat16)  # type: ignore[arg-type]
        held.to(device)  # the adapter, which peft makes on the CPU
        held.painter.checkpoint_gradients(checkpointed)
        self._module = Trainable(held)  # type: ignore[arg-type]
        self._learning = [p for p in self._module.parameters() if p.requires_grad]
        settings = OptimizerSettings(1e-5, (0.9, 0.999), 0.0)
        self._optimizers = make_optimizers(method.optimizer, self._module, settings)
        self._schedule = FlowSchedule(size.config.sampling.shift)
        self._noise = torch.randn(rows, *size.latent, device=device)
        self._index = noise_levels(torch.randn(rows))
        self._dropped = torch.zeros(rows, dtype=torch.bool, device=device)
        self._features = (
            torch.randn(rows, size.tokens, size.hidden, device=device),
            torch.ones(rows, size.tokens, dtype=torch.bool, device=device),
            torch.randn(rows, *size.latent, device=device),
            torch.randn(rows, *size.latent, device=device),
        )
        with torch.no_grad():
            forward = count(lambda: self._velocity(*self._features))
        self.flops = (1 + method.backward + checkpointed) * forward
        if compiled:
            held.painter.compile_blocks()

    def on_random_features(self) -> None:
        """A step on features that are there."""
        self(*self._features)

    def __call__(self, hidden: Tensor, mask: Tensor, latent: Tensor, source: Tensor) -> None:
        """A step, as ``training.loop.update`` takes it; for the shapes see ``Features``."""
        velocity = self._velocity(hidden, mask, latent, source)
        squared_error(velocity, self._noise - latent).mean().backward()
        nn.utils.clip_grad_norm_(self._learning, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._module.zero_grad()

    def _velocity(self, hidden: Tensor, mask: Tensor, latent: Tensor, source: Tensor) -> Tensor:
        noisy = self._schedule.add_noise(latent, self._noise, self._index)
        told = self._schedule.timesteps[self._index]
        with torch.autocast(latent.device.type, dtype=torch.bfloat16):
            velocity: Tensor = self._module(noisy, told, hidden, mask, source, self._dropped)
        return velocity


class OnlineFeatures:
    """Qwen2.5-VL and the autoencoder in bfloat16, with a batch of edits to look at.

    Pictures are decoded and cut beforehand, as threads do it while a step is computed.
    """

    def __init__(self, bench: Bench) -> None:
        config, device = bench.size.config, bench.device
        with device, made_in(torch.bfloat16):
            self._conditioner = parts.conditioner(config.understanding)
            self._autoencoder = parts.autoencoder(config.autoencoder)
        side = config.sampling.resolution
        random = np.random.default_rng(0)
        pictures = random.integers(0, 256, (bench.batch, side, side, 3), np.uint8)
        self._patches = [self._conditioner.patches(Image.fromarray(one)) for one in pictures]
        pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).to(device)
        self._pixels = pixels / 127.5 - 1
        text = bench.size.tokens - self._seen_tokens() - 2  # where vision starts and ends
        self._texts = ["a" * text] * bench.batch  # of a random tokenizer a letter is a token

    @torch.no_grad()
    def features(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Hidden states, their mask, the target's latents and the source's."""
        seen = self._conditioner.see(self._patches)
        hidden, mask = self._conditioner.encode(self._texts, seen)
        target, source = (self._autoencoder.encode(self._pixels).float() for _ in range(2))
        return hidden.float(), mask, target, source

    def _seen_tokens(self) -> int:
        merged = self._conditioner.model.config.vision_config.spatial_merge_size**2
        return int(self._patches[0].grid.prod()) // merged


def make_painter(bench: Bench) -> Painter:
    """An edit painter with random weights, in single precision."""
    with bench.device:
        painter = parts.painter(bench.size.config.painter)
    # Not zero for the source: so LoRA may begin with it, as with a trained editor.
    nn.init.normal_(painter.network.patch_embed.proj.weight, std=0.02)
    return painter


def make_size(name: str) -> Size:
    """``published`` or ``tiny``, every weight random."""
    tiny = name == "tiny"
    config = load_config(ModelConfig, CONFIGS / ("tiny.yaml" if tiny else "dim-4.6b.yaml"))
    random = {"weights": None, "dtype": None}
    qwen, dc_ae = ({}, {}) if tiny else (
        {"architecture": UNDERSTANDING}, {"architecture": AUTOENCODER}
    )  # fmt: skip
    sections = {
        "understanding": config.understanding.model_copy(update=random | qwen),
        "connector": config.connector.model_copy(update=random),
        "painter": config.painter.model_copy(update=random),
        "autoencoder": config.autoencoder.model_copy(update=random | dc_ae),
    }
    # A source of 1024 px and a blueprint of average length.
    return Size(config.model_copy(update=sections), tokens=64 if tiny else 1720)


def timed(action: Callable[[], Any], bench: Bench) -> tuple[float, int]:
    """The median of an action's seconds, and the bytes of the GPU that were held at most."""
    for _ in range(WARM_UP):
        action()
    _wait(bench.device)
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken: list[float] = []
    while not taken or (len(taken) < bench.repeats and sum(taken) < bench.seconds):
        begun = time.perf_counter()
        action()
        _wait(bench.device)
        taken.append(time.perf_counter() - begun)
    held = torch.cuda.max_memory_allocated() if bench.device.type == "cuda" else 0
    return statistics.median(taken), held


def count(action: Callable[[], Any]) -> float:
    """The FLOPs of an action, which is run once."""
    # The counter knows no attention kernel of the CPU; its plain form it does.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return float(counter.get_total_flops())


def report(rows: list[Row], bench: Bench, limit: float, peak_flops: float) -> int:
    """Measure and print row after row within ``limit`` seconds; 1 where one failed."""
    print(f"{HEAD}\n{RULE}", flush=True)
    begun, longest, failed = time.monotonic(), 0.0, False
    left_out: list[str] = []
    for row in rows:
        started = time.monotonic()
        if left_out or started - begun + longest > limit:
            left_out.append(row.name)
            continue
        try:
            line = as_line(row.name, row.measure(bench), peak_flops)
        except torch.OutOfMemoryError:
            line = _without_figures(row.name, "out of memory")
        except DimError as error:  # a package that is not there
            line = _without_figures(row.name, str(error))
        except Exception as error:  # a card is not always at hand: the other rows still count
            failed = True
            line = _without_figures(row.name, f"FAILED: {type(error).__name__}: {error}")
        print(line, flush=True)
        _clear(bench.device)
        longest = max(longest, time.monotonic() - started)
    if left_out:
        print(f"\nLeft out for want of time (--minutes): {'; '.join(left_out)}.")
    return 1 if failed else 0


def as_line(name: str, made: Measured, peak_flops: float) -> str:
    """A row of the table; what is not known is a dash."""
    rate = made.flops / made.seconds
    mfu = f"{rate / peak_flops:.1%}" if peak_flops else "–"
    held = f"{made.peak / 1e9:.1f} GB" if made.peak else "–"
    return (
        f"| {name} | {1000 * made.seconds:,.1f} | {made.samples / made.seconds:,.2f} | "
        f"{rate / 1e12:,.2f} | {mfu} | {held} | {made.note} |"
    )


def introduction(options: argparse.Namespace, bench: Bench) -> str:
    """What the table below it is of."""
    size, config = bench.size, bench.size.config
    card = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU, no GPU"
    versions = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, diffusers "
        f"{diffusers.__version__}, transformers {transformers.__version__}"
    )
    command = " ".join(["python -m benchmarks.gpu", *sys.argv[1:]])
    return (
        f"**{card}**; {versions}; `{command}`. Size {options.size}: "
        f"{config.sampling.resolution} px, {size.tokens:,} condition tokens, training on batches "
        f"of {bench.batch}, sampling in {bench.steps} steps.\n"
    )


def peak(device: torch.device) -> float:
    """Dense bfloat16 FLOPs a second of the GPU; 0 where they are not known."""
    if device.type != "cuda":
        return 0.0
    gpu = named_gpu(torch.cuda.get_device_name())
    return gpu.flops if gpu else 0.0


def _name(method: Method, *, checkpointed: bool, compiled: bool = False) -> str:
    return ", ".join(
        [
            method.name,
            *(["compiled"] if compiled else []),
            *(["checkpointing"] if checkpointed else []),
        ]
    )


def _without_figures(name: str, note: str) -> str:
    said = " ".join(note.replace("|", "/").split())
    return f"| {name} | – | – | – | – | – | {said[:200]} |"


@contextmanager
def made_in(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in ``dtype`` inside, where single precision might not fit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _clear(device: torch.device) -> None:
    """Leave nothing of a row for the next one."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--minutes", type=float, default=10.0, help="no row begins that may exceed")
    parser.add_argument("--rows", nargs="*", help="only rows with one of these in their names")
    parser.add_argument("--batch", type=int, default=4, help="samples of a training step")
    parser.add_argument("--repeats", type=int, default=10, help="timed runs of a row at most")
    parser.add_argument("--seconds", type=float, default=15.0, help="for the timed runs of a row")
    parser.add_argument("--steps", type=int, default=30, help="of the sampler")
    parser.add_argument(
        "--peak", type=float, default=0.0, help="TFLOP/s of the card in bfloat16, if not known"
    )
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
