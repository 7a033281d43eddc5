"""``dim generate "prompt"``: one image from a text on this machine."""

from __future__ import annotations

from pathlib import Path

import typer

from dim.commands.said import said_of


def main(
    prompt: str = typer.Argument(..., help="What the image shows, in words."),
    model: Path = typer.Option(..., "--model", "-m", help="Folder of a DIM, as `dim train` makes."),
    lora: list[str] = typer.Option(
        [], metavar="PATH[:WEIGHT]", help="A LoRA adapter to paint with; may be repeated."
    ),
    out: Path = typer.Option(Path("generated.png"), "--out", "-o", help="Where the PNG goes."),
    size: str | None = typer.Option(
        None, metavar="WIDTHxHEIGHT", help="In pixels; the model's own resolution by default."
    ),
    seed: int | None = typer.Option(None, min=0, help="The same seed paints the same image."),
    steps: int | None = typer.Option(None, min=1, max=1000, help="Sampler steps."),
    guidance_scale: float | None = typer.Option(None, min=1, help="1 turns guidance off."),
    negative_prompt: str | None = typer.Option(None, help="What to paint away from, in words."),
    int8: bool = typer.Option(
        False, "--int8", help="Keep the painter's weights in 8 bits (needs torchao)."
    ),
    step_cache: float = typer.Option(
        0.0, min=0, max=0.99, help="Reuse later blocks between steps, such as 0.03; 0: never."
    ),
    device: str | None = typer.Option(None, help="cpu, cuda, cuda:1, …; a GPU if there is one."),
) -> None:
    """Paint one image from a text, as a model of the t2i stage does.

    Size, seed, steps and guidance are the model's own unless given.
    """
    from dim import model as models
    from dim.devices import best_device
    from dim.images import parse_size, save_png

    wanted = None if size is None else parse_size(size)
    dim = models.load(model, device=device or best_device(), lora=lora)
    dim.speed_up(int8=int8, step_cache=step_cache)
    painted_with = dim.config.sampling.seed if seed is None else seed
    image = dim.generate(
        [prompt],
        size=wanted,
        seeds=[painted_with],
        steps=steps,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
    )[0]
    said = said_of(dim, model, lora, seed=painted_with, steps=steps, guidance_scale=guidance_scale)
    save_png(image, out, said)
    typer.echo(f"image: {out}", err=True)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
