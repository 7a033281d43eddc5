"""The picture of README: source | blueprint | edited, of a trained tabletop model.

    python -m docs.generate.picture runs/demo/training/edit2/model docs/edits.png

The edits are new to the model and drawn by a seed, one of each kind; none is chosen by how it came
out, and whether the checker finds it exact is written beside it.
"""

from __future__ import annotations

import textwrap
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

from dim import cli, model
from dim.tabletop import render, sample_edit
from dim.tabletop.checker import exact
from dim.tabletop.edits import Edit

KINDS = ("remove", "add", "replace", "adjust")
SIDE, TEXT, GAP, LINE, LETTERS = 168, 390, 12, 15, 62
_INK, _PAPER, _GREY = (20, 20, 20), (255, 255, 255), (110, 110, 110)


def draw(seed: int) -> list[Edit]:
    """An edit of each kind, in the demo's world."""
    rng = np.random.default_rng(seed)
    return [sample_edit(rng, kinds=(kind,), objects=(2, 3), outlines=0) for kind in KINDS]


def rows(path: str, seed: int) -> Image.Image:
    """The picture: a row an edit, painted by the model at ``path`` from the oracle's blueprint."""
    edits, dim = draw(seed), model.load(path)
    side = dim.config.sampling.resolution
    sources = [render(edit.source, side) for edit in edits]
    results = dim.edit(
        sources,
        [edit.instruction for edit in edits],
        blueprints=[edit.blueprint.render() for edit in edits],
    )
    height = len(edits) * (SIDE + GAP) + GAP
    canvas = Image.new("RGB", (2 * SIDE + TEXT + 4 * GAP, height), _PAPER)
    for row, (edit, source, result) in enumerate(zip(edits, sources, results, strict=True)):
        top = GAP + row * (SIDE + GAP)
        canvas.paste(_enlarged(source), (GAP, top))
        _write(canvas, edit, exact(result.image, edit.target), (2 * GAP + SIDE, top))
        canvas.paste(_enlarged(result.image), (3 * GAP + SIDE + TEXT, top))
    return canvas


def _enlarged(image: Image.Image) -> Image.Image:
    return image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _write(canvas: Image.Image, edit: Edit, is_exact: bool, place: tuple[int, int]) -> None:
    pen, (left, top) = ImageDraw.Draw(canvas), place
    bold, plain = ImageFont.load_default(15), ImageFont.load_default(11.5)
    pen.text((left, top), f"“{edit.instruction}”", _INK, bold)
    said = edit.blueprint.render().split("\n\n")[1:]
    lines = [line for part in said for line in textwrap.wrap(" ".join(part.split()), LETTERS)]
    most = (SIDE - 2 * LINE - 12) // LINE
    shown = lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} …"]
    for number, line in enumerate(shown):
        pen.text((left, top + 26 + number * LINE), line, _GREY, plain)
    found = "exact, says the checker" if is_exact else "not exact, says the checker"
    pen.text((left, top + SIDE - LINE), found, _INK, plain)


def main(
    path: Annotated[str, typer.Argument(metavar="MODEL", help="Folder of a tabletop model.")],
    out: Annotated[str, typer.Argument(help="The picture's file.")],
    seed: Annotated[int, typer.Option(help="Of the edits.")] = 1,
) -> None:
    """The picture of README."""
    rows(path, seed).quantize(128).save(out, optimize=True)


if __name__ == "__main__":
    cli.run(main)
