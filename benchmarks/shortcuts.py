"""What 8-bit weights and the step cache save, and what they cost in accuracy, on tabletop edits.

    python -m benchmarks.shortcuts --model runs/tiny/edit2/model
    python -m benchmarks.shortcuts --model MODEL --edits 8 --rounds 1   # to see that it runs

Edits of scenes that no training has seen are painted from the oracle's blueprints, whole and by
each shortcut, in turns. Told are the share of steps that went through all blocks, the CPU an edit
took (the best round), the edits that the checker finds exact, and how far the pixels are from those
of whole steps in full precision.
Without torchao the rows of int8 are left out.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.table import Table

from dim import model as models
from dim import tabletop
from dim.design import DesignRequest
from dim.designers import create
from dim.errors import InputError
from dim.images import encode_png
from dim.model import DIM

SEED = 99
THRESHOLDS = (0.03, 0.06, 0.1, 0.2)


@dataclass(frozen=True)
class Asked:
    """Edits to paint."""

    edits: Sequence[tabletop.Edit]
    sources: Sequence[Image.Image]
    blueprints: Sequence[str]


@dataclass
class Painted:
    """What came of them: how many rows the last block had, the seconds of CPU of each round."""

    images: list[NDArray[np.int64]]
    exact: int
    passes: int
    seconds: list[float] = field(default_factory=list)


def main() -> None:
    """Measure and print a table."""
    options = _options()
    torch.set_num_threads(1)
    asked = sample(options.edits, models.load(options.model).config.sampling.resolution)
    shortcuts: dict[str, dict[str, Any]] = {"whole steps": {}}
    shortcuts |= {f"step cache {each:g}": {"step_cache": each} for each in THRESHOLDS}
    shortcuts["int8 weights"] = {"int8": True}
    shortcuts["int8 weights, step cache 0.03"] = {"int8": True, "step_cache": 0.03}
    ready: dict[str, DIM] = {}
    for name, how in shortcuts.items():
        try:
            ready[name] = models.load(options.model).speed_up(**how)
        except InputError as error:
            print(f"{name}: {error}")
    painted: dict[str, Painted] = {}
    for _ in range(options.rounds):
        for name, model in ready.items():
            now = paint(model, asked, options.batch_size)
            painted.setdefault(name, now).seconds.append(now.seconds[0])
    Console(width=120).print(table(painted, options.edits))


def sample(count: int, side: int) -> Asked:
    """``count`` edits of held-out scenes and the oracle's blueprints of them."""
    edits = [tabletop.sample_edit(np.random.default_rng([SEED, each])) for each in range(count)]
    sources = [tabletop.render(edit.source, side) for edit in edits]
    requests = [
        DesignRequest(edit.instruction, encode_png(source))
        for edit, source in zip(edits, sources, strict=True)
    ]
    return Asked(edits, sources, [str(answer) for answer in create("oracle").design(requests)])


def paint(model: DIM, asked: Asked, batch_size: int) -> Painted:
    """Paint all of ``asked`` once."""
    passes: list[int] = []
    hook = model.painter.blocks[-1].attn2.register_forward_hook(
        lambda _, given, __: passes.append(len(given[0]))
    )
    started = time.process_time()
    results = model.edit(
        asked.sources,
        [edit.instruction for edit in asked.edits],
        blueprints=asked.blueprints,
        seeds=list(range(len(asked.edits))),
        batch_size=batch_size,
    )
    seconds = time.process_time() - started
    hook.remove()
    images = [result.image for result in results]
    exact = sum(
        tabletop.exact(image, edit.target) for image, edit in zip(images, asked.edits, strict=True)
    )
    pixels = [np.asarray(image, dtype=np.int64) for image in images]
    return Painted(pixels, exact, sum(passes), [seconds])


def table(painted: Mapping[str, Painted], count: int) -> Table:
    """A row a shortcut."""
    whole = painted["whole steps"]
    columns = ("whole steps", "ms of CPU an edit", "times as fast")
    shown = Table("", *columns, "exact", "largest change", "mean change")
    for name, each in painted.items():
        pairs = zip(each.images, whole.images, strict=True)
        changes = np.stack([np.abs(one - other) for one, other in pairs])
        best = min(each.seconds)
        shown.add_row(
            name,
            f"{each.passes / whole.passes:.0%}",
            f"{1000 * best / count:.1f}",
            f"{min(whole.seconds) / best:.2f}",
            f"{each.exact} of {count}",
            f"{changes.max()} of 255",
            f"{changes.mean():.3f}",
        )
    return shown


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of a DIM that edits")
    parser.add_argument("--edits", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="timed; the best counts")
    parser.add_argument("--batch-size", type=int, default=8)
    return parser.parse_args()


if __name__ == "__main__":
    main()
