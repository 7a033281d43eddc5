"""Memory of ``dim model import``: its peak must stay near the largest file that it writes.

    python -m benchmarks.model_import --parameters 100e6

makes a random checkpoint in the published layout, imports it in a process of its own, and compares
the growth of that process's resident memory with the largest output shard. Linux only.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from math import sqrt
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from diffusers import SanaTransformer2DModel
from rich.console import Console
from rich.table import Table

from dim.model import released
from dim.model.checkpoint import tensorfile
from dim.model.checkpoint.importer import import_checkpoint
from dim.model.checkpoint.tensorfile import FLOATS, Spec
from dim.model.config import AutoencoderConfig, ModelConfig, UnderstandingConfig

LIMIT = 1.3
# What both published head sizes divide, the published layers, and weights a layer of width 1.
WIDTH_STEP, LAYERS, WEIGHTS_PER_LAYER, OTHER_WEIGHTS = 224, 20, 15.5, 8
# The published null table has 8192 rows beside 1.6e9 parameters.
PARAMETERS_PER_ROW = 200_000
# The frozen parts that ship with the package: 128 hidden features, 8 latent channels.
HIDDEN_SIZE, LATENT_CHANNELS = 128, 8
FROZEN = ModelConfig(
    understanding=UnderstandingConfig(weights="package:tiny/understanding"),
    autoencoder=AutoencoderConfig(weights="package:tiny/autoencoder"),
)


def make_checkpoint(file: Path, parameters: float, dtype: str) -> None:
    """Write a random edit checkpoint whose painter has about ``parameters`` numbers."""
    steps = round(sqrt(parameters / (WEIGHTS_PER_LAYER * LAYERS + OTHER_WEIGHTS)) / WIDTH_STEP)
    width = WIDTH_STEP * max(1, steps)
    layers = round((parameters / width**2 - OTHER_WEIGHTS) / WEIGHTS_PER_LAYER)
    with torch.device("meta"):
        network = SanaTransformer2DModel(
            in_channels=2 * LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=max(1, layers),
            num_attention_heads=width // released.HEAD_DIM,
            attention_head_dim=released.HEAD_DIM,
            num_cross_attention_heads=width // released.CROSS_HEAD_DIM,
            cross_attention_head_dim=released.CROSS_HEAD_DIM,
            cross_attention_dim=width,
            caption_channels=width,
            qk_norm="rms_norm_across_heads",
        )
    rows = max(1, round(parameters / PARAMETERS_PER_ROW))
    shapes = released.published_shapes(network, HIDDEN_SIZE, rows)
    tensorfile.write(
        file,
        {name: Spec(dtype, shape) for name, shape in shapes.items()},
        lambda name: torch.randn(shapes[name], dtype=FLOATS[dtype]),
    )


def growth(warm_up: Path, file: Path, out: Path) -> int:
    """Bytes by which this process's resident memory grows at most while it imports ``file``.

    ``warm_up``: a small checkpoint, imported first, so that libraries are loaded and set up.
    """
    import_checkpoint(warm_up, out, config=FROZEN)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    import_checkpoint(file, out, config=FROZEN)
    return _status("VmHWM") - before


def _status(name: str) -> int:
    """A field of this process's status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel does not tell {name}")


def main(
    parameters: Annotated[float, typer.Option(min=4e6, help="Of the painter.")] = 100e6,
    dtype: Annotated[Literal["BF16", "F32"], typer.Option(help="Of its weights.")] = "BF16",
) -> None:
    """Import a random checkpoint and compare the memory it takes with its largest file."""
    process = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
    with tempfile.TemporaryDirectory() as name, process:
        folder = Path(name)
        make_checkpoint(folder / "small.safetensors", 1e6, dtype)
        make_checkpoint(folder / "large.safetensors", parameters, dtype)
        start = time.perf_counter()
        files = (folder / "small.safetensors", folder / "large.safetensors", folder / "dim")
        grown = process.submit(growth, *files).result()
        seconds = time.perf_counter() - start
        shard = max(file.stat().st_size for file in (folder / "dim").rglob("*.safetensors"))
    table = Table("largest shard", "memory grew by", "ratio", "limit", "seconds")
    table.add_row(
        f"{shard / 1e6:.1f} MB",
        f"{grown / 1e6:.1f} MB",
        f"{grown / shard:.2f}",
        f"{LIMIT}",
        f"{seconds:.1f}",
    )
    Console().print(table)
    if grown > LIMIT * shard:
        raise typer.Exit(1)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
