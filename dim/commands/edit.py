"""``dim edit IMAGE "instruction"``: one edit on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from dim.design import Designs
from dim.designers import create
from dim.errors import InputError


def main(
    image: Path = typer.Argument(..., help="The image to edit (PNG, JPEG, WebP, …)."),
    instruction: str = typer.Argument(..., help="What to change, in words."),
    model: Path = typer.Option(..., "--model", "-m", help="Folder of a DIM, as `dim train` makes."),
    lora: list[str] = typer.Option(
        [], metavar="PATH[:WEIGHT]", help="A LoRA adapter to paint with; may be repeated."
    ),
    out: Path = typer.Option(Path("edited.png"), "--out", "-o", help="Where the PNG goes."),
    designer: str | None = typer.Option(
        None,
        help="Who writes the blueprint: self (the model's own understanding; the default), oracle, "
        "openai:MODEL@URL, replay:PATH, or none (paint from the instruction alone).",
    ),
    blueprint: Path | None = typer.Option(
        None, help="A text file to paint from as it is; then no designer is asked."
    ),
    seed: int | None = typer.Option(None, min=0, help="The same seed paints the same image."),
    steps: int | None = typer.Option(None, min=1, max=1000, help="Sampler steps."),
    guidance_scale: float | None = typer.Option(None, min=1, help="1 turns guidance off."),
    negative_prompt: str | None = typer.Option(None, help="What to paint away from, in words."),
    square: bool = typer.Option(
        False, "--square", help="Edit the middle square only, as published, not all of the image."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, …; a GPU if there is one."),
) -> None:
    """Edit one image: the designer writes a blueprint, the painter paints it.

    Seed, steps and guidance are the model's own unless given.
    """
    if blueprint is not None and designer is not None:
        raise InputError("--blueprint and --designer exclude each other")
    text = None if blueprint is None else read_blueprint(blueprint)

    from dim import model as models
    from dim.devices import best_device
    from dim.images import read_image, save_png

    source = read_image(image)
    asked = designer_of(designer)
    dim = models.load(model, device=device or best_device(), lora=lora)
    result = dim.edit(
        [source],
        [instruction],
        blueprints=[text],
        designer=asked,
        seeds=None if seed is None else [seed],
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        fit="square" if square else None,
    )[0]
    save_png(result.image, out)
    if result.blueprint and text is None:
        typer.echo(result.blueprint)
    typer.echo(f"edited image: {out}", err=True)


def designer_of(spec: str | None) -> Designs | Literal["self"] | None:
    """What ``DIM.edit`` is to ask, by the value of ``--designer``.

    Raises:
        DesignerError: see :func:`dim.designers.create`.
    """
    if spec == "none":
        return None
    return create(spec) if spec and spec != "self" else "self"


def read_blueprint(path: Path) -> str:
    """The text of a blueprint file, as it is.

    Raises:
        InputError: it cannot be read or is empty.
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read blueprint {path}: {error}") from None
    if not text:
        raise InputError(f"blueprint {path} is empty")
    return text


if __name__ == "__main__":
    from dim.cli import run

    run(main)
