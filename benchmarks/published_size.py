"""The method at its published size on a machine without a GPU: what fits, and in what time.

    pip install --no-deps torchao
    python -m benchmarks.published_size                          # half an hour, 40 GB of disk
    python -m benchmarks.published_size --size tiny              # to see that it runs, a minute
    python -m benchmarks.published_size --work DIR --rows edit   # on the files of an earlier call

Random weights in the shapes of Qwen2.5-VL-3B, SANA1.5-1.6B and the DC-AE f32c32; pictures are small
(--resolution), for nothing of the memory that counts depends on them. Every row is a process of its
own, which gives back to the system at once what it frees. Its peak of resident memory stands beside
what the shapes say beforehand (``dim train --plan`` where a stage is trained). Leaves with status 1
when a row fails, or takes over 10 % more or less memory than was said. A row that cannot fit is not
begun; the table says what it would take.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import psutil
import pyarrow as pa
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from benchmarks.gpu import made_in, make_size
from dim import model as dim_model
from dim.features.encoder import CachedFeatures, Features, FrozenEncoder
from dim.features.shards import TableSamples
from dim.learning.optimizer import OptimizerName, OptimizerSettings, make_optimizers
from dim.learning.step import Trainable
from dim.model import parts
from dim.model.checkpoint.exporter import export_checkpoint
from dim.model.checkpoint.folder import located, read_description
from dim.model.checkpoint.importer import import_checkpoint
from dim.model.config import ModelConfig
from dim.model.flow import FlowSchedule, noise_levels, squared_error
from dim.model.lora import layers
from dim.model.lora.settings import LoraSettings
from infra.models import load_frozen
from infra.storage import open_store
from training.checkpoint_files import (
    FORMAT,
    Manifest,
    Snapshot,
    merged,
    read_into,
    read_layout,
    read_manifest,
    write_layout,
    write_manifest,
)
from training.estimate import estimate
from training.parallel import gather
from training.stage import StageConfig

NEAR = 0.10  # of what was said beforehand
# Or what was held and is free counts too, by as much as 0.8 GB; and torch compiles in this process.
AT_ONCE = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 18),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 17),
    "MALLOC_ARENA_MAX": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}
STEP, LAYOUT = "step-0", "layout.json"
PAIRS = 4
TEXT = "make the sky of this picture a little darker and leave all else as it is " * 4


class Said(NamedTuple):
    """What a row is expected to hold at most, in bytes, and how that was reckoned."""

    nbytes: float
    how: str


class Made(NamedTuple):
    """What a row did: seconds, the most bytes of resident memory, and a remark."""

    seconds: float
    peak: float
    note: str


class Row(NamedTuple):
    """A line of the table: what is done, and what memory that takes as far as shapes tell."""

    name: str
    work: Callable[[argparse.Namespace], str]
    said: Callable[[ModelConfig], Said]


def main() -> int:
    """Print the table; returns the exit status."""
    options = _options()
    if options.row:
        print(json.dumps(_alone(options)._asdict()))
        return 0
    machine = psutil.virtual_memory().total
    print(f"{os.cpu_count()} cores, {machine / 1e9:.1f} GB of memory; torch {torch.__version__}\n")
    print("| row | seconds | peak memory | said beforehand | |\n|---|---:|---:|---:|---|")
    with tempfile.TemporaryDirectory() as folder:
        options.work = options.work or folder
        failed = [row.name for row in ROWS if row.name in options.rows and not _shown(row, options)]
    if failed:
        print(f"\nFAILED: {', '.join(failed)}")
    return 1 if failed else 0


def lay_out(options: argparse.Namespace) -> str:
    """Save a random model, export it in the released layout, and import that."""
    work, config = Path(options.work), _config(options.size, options.resolution)
    saved, again = work / "model", work / "again"
    with made_in(torch.bfloat16):
        made = dim_model.build(config, dtype=torch.bfloat16)
    # Not zero for the source, as with a trained editor.
    nn.init.normal_(made.painter.network.patch_embed.proj.weight, std=0.02)
    made.save(saved)
    del made
    shutil.rmtree(work / "released", ignore_errors=True)
    files = export_checkpoint(saved, work / "released", autoencoder=True, understanding=True)
    import_checkpoint(work / "released", again, config=located(saved, read_description(saved)))
    one, other = _digests(saved), _digests(again)
    assert one == other, "the import of the export has other tensors"
    nbytes = sum(file.stat().st_size for file in files)
    return f"{len(one):,} tensors, {nbytes / 1e9:.1f} GB, the same bits out and in"


def make_features(options: argparse.Namespace) -> str:
    """What the frozen parts say about a few pairs, in single precision."""
    frozen = load_frozen(str(Path(options.work, "model")))
    for part in (frozen.conditioner, frozen.autoencoder):
        part.float()
    encoder = FrozenEncoder(frozen, edits=True, resolution=frozen.config.sampling.resolution)
    cached = CachedFeatures(encoder, TableSamples(_pairs(options)), ["blueprint"], encode_batch=1)
    batch = cached.batch(np.arange(PAIRS), np.zeros(PAIRS, np.int64))
    torch.save(vars(batch), Path(options.work, "features.pt"))
    return f"{PAIRS} pairs, {int(batch.mask.sum()) // PAIRS} tokens each"


def train_adapter(options: argparse.Namespace) -> str:
    """Two steps of LoRA; the second begins where the first has changed something."""
    learner = Learner(options, "adamw", LoraSettings())
    losses = [learner.step(number) for number in range(2)]
    return f"losses {losses[0]:.4f}, {losses[1]:.4f}; {learner.count:,} numbers learn"


def train_all(optimizer: OptimizerName, options: argparse.Namespace) -> str:
    """One step of connector and painter, with checkpointing."""
    learner = Learner(options, optimizer, None)
    before = learner.some_weights()
    loss = learner.step(0)
    assert not torch.equal(before, learner.some_weights()), "the step has changed nothing"
    return f"loss {loss:.4f}; {learner.count:,} numbers learn"


def save_and_load(options: argparse.Namespace) -> str:
    """A checkpoint of the weights, saved by two processes of half of them each, loaded by one."""
    folder = Path(options.work, "checkpoint")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    mp.start_processes(_save_half, (options,), nprocs=2, start_method="spawn")
    begun, store = time.perf_counter(), open_store(str(folder))
    manifest = read_manifest(store, STEP)
    loaded = {name: torch.empty(shape) for name, shape in _learning(options).items()}
    read_into(loaded, store, STEP, read_layout(store, STEP, manifest))
    seconds = time.perf_counter() - begun
    for number, (name, tensor) in enumerate(loaded.items()):
        assert torch.equal(tensor, _values(number, tensor.shape)), f"{name} has other values"
    sizes = sorted(facts.size for name, facts in manifest.files.items() if name.endswith(".bin"))
    assert len(sizes) == 2 and sizes[0] > sizes[1] / 2, "one process has written nearly all"
    return f"{sum(sizes) / 1e9:.1f} GB in two files, the same bits, loaded in {seconds:.0f} s"


def _save_half(rank: int, options: argparse.Namespace) -> None:
    folder = Path(options.work, "checkpoint")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    mesh, store = init_device_mesh("cpu", (2,)), open_store(str(folder))
    tensors: dict[str, Tensor] = {
        name: distribute_tensor(_values(number, shape), mesh, [Shard(0)], src_data_rank=None)
        for number, (name, shape) in enumerate(_learning(options).items())
    }
    snapshot = Snapshot(tensors, None)
    snapshot.take(tensors)
    file = f"{rank:05d}.bin"
    written = gather([(file, *snapshot.write(store, f"{STEP}/{file}"))])
    if written is not None:
        layout = merged([part for _, _, part in written])
        files = {name: facts for name, facts, _ in written}
        files[LAYOUT] = write_layout(store, f"{STEP}/{LAYOUT}", layout)
        manifest = Manifest(
            format=FORMAT, step=0, saved_at=time.time(), workers=2, metrics={}, values={},
            layout=LAYOUT, files=files,
        )  # fmt: skip
        write_manifest(store, STEP, manifest)
    dist.barrier()
    dist.destroy_process_group()


def _learning(options: argparse.Namespace) -> dict[str, torch.Size]:
    """The shapes of connector and painter."""
    with torch.device("meta"):
        made = parts.make(_config(options.size, options.resolution), seed=0, dtype=None)
    both = nn.ModuleDict({"connector": made.connector, "painter": made.painter})
    return {name: tensor.shape for name, tensor in both.named_parameters()}


def _values(number: int, shape: torch.Size) -> Tensor:
    """What stands for the ``number``-th weight."""
    return torch.empty(shape).uniform_(generator=torch.Generator().manual_seed(number))


def edit(options: argparse.Namespace) -> str:
    """An edit of two sampler steps; the painter in bfloat16, or all of it would not fit."""
    made = dim_model.load(Path(options.work, "model"))
    made.conditioner.float()
    made.autoencoder.float()
    side = made.config.sampling.resolution
    (result,) = made.edit([_picture(side, 0)], [TEXT], steps=2, guidance_scale=1.0)
    assert result.image.size == (side, side)
    return f"{side} px, the painter in bfloat16"


class Learner:
    """Connector and painter of the saved model in single precision, on the saved features."""

    def __init__(
        self, options: argparse.Namespace, optimizer: OptimizerName, lora: LoraSettings | None
    ) -> None:
        config = located(Path(options.work, "model"), read_description(Path(options.work, "model")))
        self._features = Features(**torch.load(Path(options.work, "features.pt")))
        hidden = self._features.hidden_states.shape[-1]
        held = nn.Module()
        held.connector = parts.connector(config.connector, hidden, dtype=torch.float32)
        held.painter = parts.painter(config.painter, dtype=torch.float32)
        held.train()
        if lora is not None:
            layers.attach(held, lora, seed=0)  # type: ignore[arg-type]
        held.painter.checkpoint_gradients(True)
        self._module = Trainable(held)  # type: ignore[arg-type]
        self._learning = [p for p in self._module.parameters() if p.requires_grad]
        settings = OptimizerSettings(1e-4, (0.9, 0.999), 0.0)
        self._optimizers = make_optimizers(optimizer, self._module, settings)
        self._schedule = FlowSchedule(config.sampling.shift)

    @property
    def count(self) -> int:
        """Numbers that learn."""
        return sum(p.numel() for p in self._learning)

    def some_weights(self) -> Tensor:
        """A copy of one of the weights that learn."""
        return self._learning[0].detach().clone()

    def step(self, number: int) -> float:
        """A step on one pair, as ``training.loop.update`` takes it; its loss."""
        chosen = slice(number, number + 1)
        one = Features(*(value[chosen] for value in vars(self._features).values()))
        generator = torch.Generator().manual_seed(number)
        noise = torch.randn(one.latent.shape, generator=generator)
        index = noise_levels(torch.randn(1, generator=generator))
        velocity = self._module(
            self._schedule.add_noise(one.latent, noise, index),
            self._schedule.timesteps[index],
            one.hidden_states,
            one.mask,
            one.source_latent,
            torch.zeros(1, dtype=torch.bool),
        )
        loss = squared_error(velocity, noise - one.latent).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self._learning, 1.0)
        for optimizer in self._optimizers:
            optimizer.step()
        self._module.zero_grad()
        return loss.item()


def saved_in_half(config: ModelConfig) -> Said:
    """The whole model in bfloat16."""
    return Said(2 * sum(_counts(config).values()), "2 bytes a weight")


def frozen_in_single(config: ModelConfig) -> Said:
    """The frozen parts in single precision."""
    counts = _counts(config)
    return Said(4 * (counts["conditioner"] + counts["autoencoder"]), "4 bytes a weight")


def planned(
    optimizer: OptimizerName, config: ModelConfig, lora: LoraSettings | None = None
) -> Said:
    """As ``dim train --plan`` reckons."""
    stage = StageConfig(
        stage="edit2", init="none", data=["none"], out="none", steps=1, batch_size=1,
        learning_rate=1e-4, optimizer=optimizer, lora=lora, gradient_checkpointing=True,
    )  # fmt: skip
    made = estimate(stage, config, 1, features=True)
    return Said(made.needed, "`dim train --plan`")


def saved_in_single(config: ModelConfig) -> Said:
    """What learns in single precision, and the copies that are written."""
    counts = _counts(config)
    return Said(2 * 4 * (counts["connector"] + counts["painter"]), "2 × 4 bytes a weight")


ROWS = (
    Row("layout", lay_out, saved_in_half),
    Row("features", make_features, frozen_in_single),
    Row("lora", train_adapter, partial(planned, "adamw", lora=LoraSettings())),
    Row("adamw", partial(train_all, "adamw"), partial(planned, "adamw")),
    Row("adamw8bit", partial(train_all, "adamw8bit"), partial(planned, "adamw8bit")),
    Row("checkpoint", save_and_load, saved_in_single),
    # Connector and painter stay in the file, which is mapped.
    Row("edit", edit, frozen_in_single),
)


def _shown(row: Row, options: argparse.Namespace) -> bool:
    """Print a row; whether it is as was said."""
    said = row.said(_config(options.size, options.resolution))
    beforehand = f"{said.nbytes / 1e9:.1f} GB ({said.how})"
    free = psutil.virtual_memory().available
    if said.nbytes > free:
        print(f"| {row.name} | – | – | {beforehand} | does not fit into {free / 1e9:.1f} GB |")
        return True
    told = [f"--{key}={getattr(options, key)}" for key in ("size", "resolution", "work")]
    command = [sys.executable, "-m", "benchmarks.published_size", f"--row={row.name}", *told]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | AT_ONCE
    )
    if done.returncode:
        last = (done.stderr.splitlines() or [f"status {done.returncode}"])[-1]
        print(f"| {row.name} | – | – | {beforehand} | FAILED: {last} |")
        return False
    made = Made(**json.loads(done.stdout.splitlines()[-1]))
    near = abs(made.peak / said.nbytes - 1) <= NEAR or options.size == "tiny"
    note = made.note if near else f"{made.note}; NOT AS SAID"
    print(
        f"| {row.name} | {made.seconds:.0f} | {made.peak / 1e9:.1f} GB | {beforehand} | {note} |",
        flush=True,
    )
    return near


def _alone(options: argparse.Namespace) -> Made:
    """Do a row in this process, watching its memory."""
    (row,) = [row for row in ROWS if row.name == options.row]
    with _peak() as most:
        begun = time.perf_counter()
        note = row.work(options)
        seconds = time.perf_counter() - begun
    return Made(seconds, most(), note)


@contextmanager
def _peak() -> Iterator[Callable[[], int]]:
    """Gives the most bytes that this process and those it starts have held in the block.

    Pages of files that are mapped do not count: the kernel takes them back when it wants to.
    """
    before, highest, stopped = _anonymous(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stopped.wait(0.05):
            highest = max(highest, _anonymous() - before)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield lambda: highest
    stopped.set()
    thread.join()


def _anonymous() -> int:
    here = psutil.Process()
    return sum(map(_anonymous_of, [here.pid, *(child.pid for child in here.children(True))]))


def _anonymous_of(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it has just ended
        return 0
    found = (int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
    return next(found, 0)  # one that has ended and was not waited for has none


@lru_cache
def _config(size: str, resolution: int) -> ModelConfig:
    config = make_size(size).config
    if size == "tiny":
        return config
    # As many image tokens as a picture of that size has, in multiples of two patches of 14.
    seen = config.understanding.model_copy(update={"image_size": resolution * 7 // 8})
    drawn = config.sampling.model_copy(update={"resolution": resolution})
    return config.model_copy(update={"understanding": seen, "sampling": drawn})


def _counts(config: ModelConfig) -> dict[str, int]:
    """Numbers in each part, without one of them made."""
    with torch.device("meta"):
        modules = parts.make(config, seed=0, dtype=None)
    return {
        name: sum(p.numel() for p in module.parameters())
        for name, module in zip(modules._fields, modules, strict=True)
    }


def _digests(folder: Path) -> dict[str, str]:
    """A hash of every tensor of a model folder, whatever file it lies in."""
    found = {}
    for file in sorted(folder.rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                tensor = tensors.get_tensor(name).view(torch.uint8).numpy()
                part = file.parent.relative_to(folder)
                found[f"{part}/{name}"] = hashlib.sha256(tensor.tobytes()).hexdigest()
    return found


def _picture(side: int, seed: int) -> Image.Image:
    random = np.random.default_rng(seed).integers(0, 256, (side // 8, side // 8, 3), np.uint8)
    return Image.fromarray(random).resize((side, side), Image.Resampling.BICUBIC)


def _pairs(options: argparse.Namespace) -> pa.Table:
    def encoded(seed: int) -> bytes:
        file = io.BytesIO()
        _picture(options.resolution, seed).save(file, "PNG")
        return file.getvalue()

    return pa.Table.from_pylist(
        [
            {
                "id": str(number),
                "blueprint": TEXT,
                "image": encoded(2 * number),
                "image_target": encoded(2 * number + 1),
            }
            for number in range(PAIRS)
        ]
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=("published", "tiny"), default="published")
    parser.add_argument("--resolution", type=int, default=512, help="pixels, a multiple of 64")
    parser.add_argument("--work", help="folder for models and features; a temporary one if not")
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names)
    parser.add_argument("--row", choices=names, help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
