"""What one call paints: its rows, the batches they are painted in, and where a batch stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from PIL import Image
from torch import Tensor

from dim.errors import InputError
from dim.model.config import SamplingConfig
from dim.model.sizes import Size

T = TypeVar("T")


@dataclass(frozen=True)
class Row:
    """One image to be painted, the ``number``-th of the call.

    ``size``: (width, height) in pixels as it is painted; ``final_size``: as it is given back.
    """

    number: int
    image: Image.Image | None
    text: str
    blueprint: str | None
    negative: str | None
    seed: int
    guidance_scale: float
    size: Size
    final_size: Size


@dataclass(frozen=True)
class Progress:
    """Where sampling stands after a step.

    ``numbers``: which of the call's images are painted together, counted from 0. ``step`` of
    ``steps`` are done.
    ``previews``: call it for these images as the painter sees them finished by now, RGB and of
    their final sizes; it decodes the batch, which costs about as much as a few steps.
    """

    numbers: tuple[int, ...]
    step: int
    steps: int
    previews: Callable[[], list[Image.Image]]


@dataclass(frozen=True)
class Conditioning:
    """What the painter is told: conditions (B, N, F) with their mask (B, N), right-padded.

    ``negative`` (B, M, F) and ``negative_mask`` (B, M) likewise; None where no row has any.
    """

    condition: Tensor
    mask: Tensor
    negative: Tensor | None = None
    negative_mask: Tensor | None = None

    def select(self, places: Sequence[int]) -> Conditioning:
        """The same for some of the rows, without the padding that they do not need."""
        chosen = list(places)
        condition, mask = _trimmed(self.condition[chosen], self.mask[chosen])
        if self.negative is None or self.negative_mask is None:
            return Conditioning(condition, mask)
        return Conditioning(condition, mask, self.negative[chosen], self.negative_mask[chosen])


OnStep = Callable[[Progress], None]


def make_rows(
    sampling: SamplingConfig,
    images: Sequence[Image.Image | None],
    texts: Sequence[str],
    sizes: Sequence[tuple[Size, Size]],
    *,
    blueprints: Sequence[str | None] | None = None,
    seeds: Sequence[int] | None,
    guidance_scale: float | Sequence[float] | None,
    negative_prompt: str | Sequence[str | None] | None,
) -> list[Row]:
    """The arguments of a call as rows, the unset ones as ``sampling`` has them.

    Args:
        sampling: the model's defaults.
        images, texts: one each a row.
        sizes: a row's size as it is painted, and as it is given back.
        blueprints, seeds, guidance_scale, negative_prompt: as for ``DIM.edit``.

    Raises:
        InputError: counts differ.
    """
    count = len(images)
    if isinstance(guidance_scale, int | float):
        guidance_scale = [float(guidance_scale)] * count
    if isinstance(negative_prompt, str):
        negative_prompt = [negative_prompt] * count
    rows = zip(
        images,
        texts,
        sizes,
        one_per_image(count, "blueprints", blueprints, None),
        one_per_image(count, "negative prompts", negative_prompt, None),
        one_per_image(count, "seeds", seeds, sampling.seed),
        one_per_image(count, "guidance scales", guidance_scale, sampling.guidance_scale),
        strict=True,
    )
    return [
        Row(number, image, text, blueprint, negative, seed, scale, *size)
        for number, (image, text, size, blueprint, negative, seed, scale) in enumerate(rows)
    ]


def one_per_image(count: int, name: str, values: Sequence[T] | None, default: T) -> list[T]:
    """``values``, or ``default`` ``count`` times.

    Raises:
        InputError: there are not ``count`` values.
    """
    if values is None:
        return [default] * count
    if len(values) != count:
        raise InputError(f"{count} images came with {len(values)} {name}")
    return list(values)


def batches(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    """``rows``, at most ``size`` at a time.

    Raises:
        InputError: there are no rows, or ``size`` is below 1.
    """
    if not rows:
        raise InputError("there is nothing to paint")
    if size < 1:
        raise InputError(f"the batch size must be 1 or more, not {size}")
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def by_size(rows: Sequence[Row]) -> list[list[int]]:
    """Places of the rows that are painted at one size, group by group."""
    groups: dict[Size, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(row.size, []).append(place)
    return list(groups.values())


def _trimmed(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    longest = int(mask.sum(dim=1).max())
    return tokens[:, :longest], mask[:, :longest]
