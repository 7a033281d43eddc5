"""``dim train STAGE --plan``: what a stage takes of its GPUs, of time and of money.

Nothing is loaded: the trained parts are built from tensors that have shapes and no data, and run
once. What their backward pass keeps, and their multiplications, are counted so, on any machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import SanaTransformer2DModel
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from dim.errors import ConfigError, InputError
from dim.gpus import Gpu, find_gpu
from dim.learning.optimizer import MOMENT_BYTES
from dim.learning.step import Trainable
from dim.model.config import ModelConfig
from dim.model.connector import Connector
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings
from dim.model.painter import Painter
from infra.models import read_config
from infra.samples import holds_features
from training.mixture import count_sources, describe_mixture, epoch_samples
from training.plan import count_samples, epoch_steps
from training.shapes import find_shapes
from training.stage import StageConfig

TEXT_TOKENS = {"caption": 700, "instruction": 80, "blueprint": 430}
"""Of a text of average length, by its column; the published ones."""

MFU = 0.35
"""The share of a GPU's peak that a step is reckoned to reach."""

_USABLE = 0.95  # of a GPU's memory; kernels want some for a moment
_WITH_BACKWARD = 3  # times the work of a forward pass
_WITH_FROZEN_WEIGHTS = 2  # the same where next to no weight wants a gradient
_FLOAT, _HALF = 4, 2  # bytes of a weight, of its gradient and of its average


class Frozen(NamedTuple):
    """The frozen parts: ``hidden`` features a token, and of text and pictures the work.

    ``flops_a_token`` of the language model, ``flops_a_picture`` of the vision tower, and
    ``flops_a_latent`` of the autoencoder's encoder.
    """

    hidden: int
    parameters: float
    flops_a_token: float
    flops_a_picture: float
    flops_a_latent: float


# Of the published parts, whose sizes their configurations here leave to the weights: Qwen2.5-VL-3B
# (its vision tower on 5,476 patches) and the DC-AE f32c32 at 1024 pixels.
_PUBLISHED = Frozen(2048, 3.75e9 + 0.31e9, 2 * 3.09e9, 0.7e13, 0.15e13)


@dataclass(frozen=True)
class Estimate:
    """What a stage takes.

    Attributes:
        parameters: that learn.
        steps: in all.
        passes: forward and backward passes of a step on each worker.
        rows: samples of a pass.
        tokens: condition tokens of a sample.
        memory: bytes of a GPU, by what they hold.
        checkpoint: bytes of one.
        trained_flops: of a step, over all workers, for connector and painter.
        frozen_flops: the same for the frozen parts; 0 where features were made before.
        workers: GPUs, where their number may change the fewest, of which each holds most.
        most_workers: the same at most.
    """

    parameters: int
    steps: int
    passes: int
    rows: int
    tokens: int
    memory: dict[str, float]
    checkpoint: float
    trained_flops: float
    frozen_flops: float
    workers: int
    most_workers: int

    @property
    def needed(self) -> float:
        """Bytes of a GPU in all."""
        return sum(self.memory.values())

    def hours(self, gpu: Gpu, mfu: float = MFU) -> float:
        """How long all steps take on the fewest GPUs at that share of the peak."""
        flops = (self.trained_flops + self.frozen_flops) * self.steps
        return flops / (gpu.flops * mfu * self.workers) / 3600


def estimate(
    config: StageConfig,
    model: ModelConfig,
    steps: int,
    *,
    features: bool,
    text_tokens: int | None = None,
) -> Estimate:
    """What a stage takes.

    Args:
        config: of the stage.
        model: that it starts from.
        steps: in all.
        features: its data are features that were made before.
        text_tokens: of a text; ``TEXT_TOKENS`` unless given.

    Raises:
        ConfigError: the model's description does not say its painter's sizes.
    """
    frozen, cell = frozen_parts(model)
    side = model.sampling.resolution // cell
    tokens = text_tokens or max(TEXT_TOKENS[text] for text in config.texts)
    if config.edits:
        tokens += _image_tokens(model)
    tokens = min(tokens, model.understanding.max_condition_tokens)
    fewest, most = config.worker_range
    share = math.ceil(config.batch_size / fewest)
    rows = min(config.micro_batch or share, share)
    passes = math.ceil(share / rows)
    counted = count_pass(
        model, frozen.hidden, rows, tokens, side, edits=config.edits,
        checkpointed=config.gradient_checkpointing, bf16=config.precision == "bf16",
        lora=config.lora,
    )  # fmt: skip
    held = counted.parameters / config.parallelism.parts(fewest)
    short = _HALF if config.precision == "bf16" else _FLOAT
    averages = 0 if config.ema_decay is None else _FLOAT
    memory = {
        "weights": _FLOAT * held + short * counted.frozen,
        "gradients": _FLOAT * held,
        "optimizer": MOMENT_BYTES[config.optimizer] * held,
        "averages": 0 if config.ema_on_cpu else averages * held,
        "weights in bfloat16": _HALF * counted.parameters if config.precision == "bf16" else 0,
        "kept for the backward pass": counted.kept,
        "frozen parts": (
            0 if features and config.validation is None else short * frozen.parameters
        ),
    }
    samples = config.batch_size
    return Estimate(
        parameters=counted.parameters,
        steps=steps,
        passes=passes,
        rows=rows,
        tokens=tokens,
        memory=memory,
        checkpoint=counted.parameters * (_FLOAT + MOMENT_BYTES[config.optimizer] + averages),
        trained_flops=counted.flops / rows * samples,
        frozen_flops=0 if features else samples * _frozen_flops(frozen, config, tokens),
        workers=fewest,
        most_workers=most,
    )


def sample_flops(config: StageConfig, model: ModelConfig, tokens: int, *, live: bool) -> float:
    """The work of a sample with so many condition tokens, forward and backward, of the model alone.

    Args:
        config: of the stage.
        model: that is trained.
        tokens: of text and image.
        live: the frozen parts run too.

    Raises:
        ConfigError: as for :func:`estimate`.
    """
    frozen, cell = frozen_parts(model)
    counted = count_pass(
        model, frozen.hidden, 1, max(1, tokens), model.sampling.resolution // cell,
        edits=config.edits, checkpointed=False, bf16=config.precision == "bf16",
        lora=config.lora,
    )  # fmt: skip
    return counted.flops + (_frozen_flops(frozen, config, tokens) if live else 0)


def _frozen_flops(frozen: Frozen, config: StageConfig, tokens: int) -> float:
    """The work of the frozen parts on a sample."""
    pictures = 2 if config.edits else 1
    work = frozen.flops_a_token * tokens + frozen.flops_a_picture * config.edits
    return work + pictures * frozen.flops_a_latent


class Wanted(NamedTuple):
    """What ``--plan`` is told besides the stage.

    ``samples`` and ``model`` stand for data and ``init`` that are not there yet.
    """

    gpu: str | None = None
    price: float | None = None
    mfu: float = MFU
    samples: int | None = None
    model: str | None = None


def plan(config: StageConfig, wanted: Wanted) -> Table:
    """The estimate of a stage for a terminal; nothing is started, and nothing written.

    Raises:
        DimError: ``init`` or the data are not there, or cannot be reckoned with.
    """
    if wanted.price is not None and wanted.gpu is None:
        raise InputError("--price needs --gpu: dollars follow from hours")
    model = read_config(wanted.model or config.init)
    features = wanted.samples is None and holds_features(config.uris)
    mixture, shapes = "", None
    if wanted.samples is None:
        count_samples(config)  # and check them
        sources = count_sources(config)
        samples = sum(epoch_samples(config, sources))
        if len(sources) > 1:
            mixture = describe_mixture(config, sources)
        if (found := find_shapes(config, model)) is not None:
            shapes = found.told()
            if mixture:
                names = config.source_names
                mixture += f"; {shapes.describe_mixture(config.batch_size, names)}"
    elif any(source.changes_the_mixture for source in config.data) and config.epochs:
        raise InputError(
            "--samples says nothing about each of the sources that are mixed: give steps=N, for "
            "epochs depend on it"
        )
    else:
        samples = wanted.samples
    steps = config.steps or (config.epochs or 0) * epoch_steps(samples, config.batch_size, shapes)
    made = estimate(config, model, steps, features=features)
    return as_table(made, config, wanted, mixture=mixture)


class Pass(NamedTuple):
    """A forward and a backward pass: ``kept`` bytes in between, ``flops`` of both.

    The backward pass is reckoned as twice the forward one, and thrice with checkpointing; where an
    adapter learns, as once and twice. ``parameters`` learn, ``frozen`` ones of connector and
    painter do not.
    """

    parameters: int
    frozen: int
    kept: int
    flops: int


def count_pass(
    model: ModelConfig,
    hidden: int,
    rows: int,
    tokens: int,
    side: int,
    *,
    edits: bool,
    checkpointed: bool,
    bf16: bool,
    lora: LoraSettings | None = None,
) -> Pass:
    """Count a pass of connector and painter over ``rows`` samples, with nothing computed.

    Args:
        model: whose parts they are.
        hidden: features of a token.
        rows: samples.
        tokens: of each.
        side: of the latents, which are square.
        edits: the painter sees a source.
        checkpointed: with gradient checkpointing.
        bf16: under autocast.
        lora: an adapter is trained, and nothing else.

    Raises:
        InputError: the adapter does not fit the model.
        ConfigError: as for :func:`estimate`.
    """
    architecture = _painter_sizes(model)
    channels = int(architecture["in_channels"])
    kept: dict[int, torch.Tensor] = {}
    with torch.device("meta"):
        module = _trainable(model, architecture, hidden, edits=edits)
        if lora is not None:
            frozen = torch.bfloat16 if bf16 else None
            layers.insert(module, lora, seed=0, frozen=frozen)  # type: ignore[arg-type]
    with FakeTensorMode(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        _pretend(module)
        module.painter.checkpoint_gradients(checkpointed)
        weights = {p.untyped_storage()._cdata for p in module.parameters()}
        latent = torch.empty(rows, channels, side, side)
        inputs = (
            latent,
            torch.zeros(rows, dtype=torch.float64),
            torch.empty(rows, tokens, hidden),
            torch.ones(rows, tokens, dtype=torch.bool),
            latent if edits else None,
            torch.zeros(rows, dtype=torch.bool),
        )
        with _keeping(kept, weights):
            module(*inputs)
        counter = FlopCounterMode(display=False)
        # In its plain form, for the counter does not know the CPU's kernel of attention.
        with torch.no_grad(), counter, sdpa_kernel(SDPBackend.MATH):
            module(*inputs)
        nbytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        learning = sum(p.numel() for p in module.parameters() if p.requires_grad)
        every = sum(p.numel() for p in module.parameters())
    # torch's counter takes the backward pass of a depthwise convolution for that of a full one.
    passes = checkpointed + (_WITH_BACKWARD if lora is None else _WITH_FROZEN_WEIGHTS)
    flops = passes * int(counter.get_total_flops())
    return Pass(learning, every - learning, nbytes, flops)


def as_table(made: Estimate, config: StageConfig, wanted: Wanted, *, mixture: str = "") -> Table:
    """The estimate for a terminal; ``mixture`` says what an epoch has of each source.

    Raises:
        InputError: there is no such GPU.
    """
    table = Table("", "", title=f"{config.stage}: what it takes", show_header=False)
    table.add_row("trained parameters", f"{made.parameters:,}")
    table.add_row("steps", f"{made.steps:,} of {config.batch_size} samples")
    if mixture:
        table.add_row("an epoch", mixture)
    table.add_row(
        "a step of a worker",
        f"{made.passes} {'pass' if made.passes == 1 else 'passes'} of {made.rows} samples with "
        f"{made.tokens:,} condition tokens",
    )
    table.add_row("work of a step", f"{made.trained_flops:.3g} FLOPs trained, "
                  f"{made.frozen_flops:.3g} in the frozen parts")  # fmt: skip
    table.add_row(
        "a checkpoint",
        f"{_gigabytes(made.checkpoint)}; {_gigabytes(made.checkpoint / made.workers)} of each "
        "worker's CPU memory",
    )
    table.add_section()
    for name, nbytes in made.memory.items():
        if nbytes:
            table.add_row(name, _gigabytes(nbytes))
    table.add_row(f"memory of each of {made.workers} GPUs", _gigabytes(made.needed))
    if wanted.gpu is not None:
        gpu = find_gpu(wanted.gpu)
        hours = made.hours(gpu, wanted.mfu)
        fits = "fits" if made.needed < _USABLE * gpu.memory else "does not fit"
        table.add_row(f"on {wanted.gpu}", f"{fits} into {_gigabytes(gpu.memory)}")
        table.add_row(f"hours at {wanted.mfu:.0%} of its peak", f"{hours:,.1f}")
        if made.most_workers > made.workers:
            least = hours * made.workers / made.most_workers
            table.add_row(f"on {made.most_workers} GPUs", f"{least:,.1f}")
        if wanted.price is not None:
            dollars = hours * made.workers * wanted.price
            table.add_row(f"at ${wanted.price:g} a GPU and hour", f"${dollars:,.0f}")
    return table


def _trainable(
    model: ModelConfig, architecture: dict[str, Any], hidden: int, *, edits: bool
) -> Trainable:
    channels = int(architecture["in_channels"])
    sizes = {**architecture, "in_channels": channels * (2 if edits else 1)}
    conditions = model.connector.out_features
    table = torch.empty(model.painter.null_condition_tokens, conditions)
    parts = nn.Module()
    parts.connector = Connector(hidden, conditions)
    parts.painter = Painter(SanaTransformer2DModel(**sizes), table)
    parts.painter.train()
    return Trainable(parts)  # type: ignore[arg-type]


def _pretend(module: nn.Module) -> None:
    """Put the weights of ``module``, which is on no device, onto the CPU of a fake tensor mode."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            made = torch.empty(weight.shape, dtype=weight.dtype)
            part.register_parameter(name, nn.Parameter(made, requires_grad=weight.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            part.register_buffer(name, torch.empty(buffer.shape, dtype=buffer.dtype))


@contextmanager
def _keeping(kept: dict[int, torch.Tensor], weights: set[int]) -> Iterator[None]:
    """Note the tensors that are kept for a backward pass, each storage once, weights not."""

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)  # held, or its address would be given to another one
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def _painter_sizes(model: ModelConfig) -> dict[str, Any]:
    if "in_channels" not in model.painter.architecture:
        raise ConfigError("the model's description has no painter.architecture to reckon with")
    return dict(model.painter.architecture)


def frozen_parts(model: ModelConfig) -> tuple[Frozen, int]:
    """The frozen parts, and the pixels of a latent's cell."""
    architecture = model.understanding.architecture
    cells = model.autoencoder.architecture.get("encoder_block_out_channels")
    cell = 2 ** (len(cells) - 1) if cells else 32
    if not architecture:
        return _PUBLISHED, cell
    with torch.device("meta"):
        whole = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**architecture))
    parameters = sum(p.numel() for p in whole.parameters())
    vision = sum(p.numel() for p in whole.model.visual.parameters())
    patches = (model.understanding.image_size // _vision(model)["patch_size"]) ** 2
    work = (2.0 * (parameters - vision), 2.0 * vision * patches, 0.0)
    return Frozen(int(architecture["text_config"]["hidden_size"]), parameters, *work), cell


def _image_tokens(model: ModelConfig) -> int:
    vision = _vision(model)
    token = vision["patch_size"] * vision["spatial_merge_size"]
    side = round(model.understanding.image_size / token)
    return int(side) ** 2


def _vision(model: ModelConfig) -> dict[str, int]:
    published = {"patch_size": 14, "spatial_merge_size": 2}
    return {**published, **model.understanding.architecture.get("vision_config", {})}


def _gigabytes(nbytes: float) -> str:
    return f"{nbytes / 1e9:,.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:,.1f} MB"
