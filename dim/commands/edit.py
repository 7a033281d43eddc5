"""``dim edit IMAGE "instruction"``: one edit on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from dim.commands.said import said_of
from dim.design import DesignRequest, Designs
from dim.designers import create
from dim.errors import InputError
from dim.reflection import (
    MOST_CANDIDATES,
    MOST_ROUNDS,
    Reflection,
    Wanted,
    reflect,
    require_reviews,
)

if TYPE_CHECKING:  # torch takes seconds
    from PIL import Image

    from dim.model import DIM


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
    rounds: int = typer.Option(
        1,
        min=1,
        max=MOST_ROUNDS,
        help="The designer looks at the image and has it painted again "
        "until it is content, this often at most.",
    ),
    best_of: int = typer.Option(
        1,
        min=1,
        max=MOST_CANDIDATES,
        help="Images a round, of which the designer takes the best.",
    ),
    int8: bool = typer.Option(
        False, "--int8", help="Keep the painter's weights in 8 bits (needs torchao)."
    ),
    step_cache: float = typer.Option(
        0.0, min=0, max=0.99, help="Reuse later blocks between steps, such as 0.03; 0: never."
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
    reviewed = rounds > 1 or best_of > 1
    if reviewed:
        require_reviews(asked)
    dim = models.load(model, device=device or best_device(), lora=lora)
    dim.speed_up(int8=int8, step_cache=step_cache)
    settings: dict[str, Any] = {
        "steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
        "fit": "square" if square else None,
    }
    painted_with = dim.config.sampling.seed if seed is None else seed
    written: str | None
    if reviewed:
        edited, best = edit_and_review(
            dim, source, instruction, asked, painted_with, rounds, best_of, **settings
        )
        written, painted_with = best.plan, best.seed
    else:
        (result,) = dim.edit(
            [source],
            [instruction],
            blueprints=[text],
            designer=asked,
            seeds=[painted_with],
            **settings,
        )
        edited, written = result.image, result.blueprint
    said = said_of(
        dim, model, lora,
        seed=painted_with, steps=steps, guidance_scale=guidance_scale, blueprint=written,
    )  # fmt: skip
    save_png(edited, out, said)
    if written and text is None:
        typer.echo(written)
    typer.echo(f"edited image: {out}", err=True)


def edit_and_review(
    dim: DIM,
    source: Image.Image,
    instruction: str,
    designer: Any,
    seed: int,
    rounds: int,
    candidates: int,
    **settings: Any,
) -> tuple[Image.Image, Wanted]:
    """The best of what is painted until ``designer`` is content, and what was wanted of it.

    What the designer thinks of each is written to the terminal.

    Raises:
        DesignerError: there is no blueprint to begin with.
    """
    from dim.images import encode_png
    from dim.model.plan import blueprint_of

    (answer,) = designer.design([DesignRequest(instruction, encode_png(source))])
    plan = blueprint_of(answer, instruction)
    reflection: Reflection[Image.Image] = Reflection(
        instruction, plan, seed, rounds=rounds, candidates=candidates
    )

    def paint(wanted: Sequence[Wanted]) -> list[Image.Image]:
        results = dim.edit(
            [source] * len(wanted),
            [instruction] * len(wanted),
            blueprints=[each.plan for each in wanted],
            seeds=[each.seed for each in wanted],
            **settings,
        )
        return [result.image for result in results]

    best = reflect(paint, designer, source, reflection)
    for each in reflection.candidates:
        chosen = " (taken)" if each is best else ""
        typer.echo(f"round {each.round}, seed {each.wanted.seed}{chosen}: {each}", err=True)
    return best.image, best.wanted


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
