"""What travels between the deployments. Images travel encoded, as in the data path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dim.errors import DimError
from dim.model.config import Fit
from serving.encoding import PNG, Output
from serving.shipping import Shipped


@dataclass(frozen=True)
class DesignJob:
    """One blueprint to write. ``image``: a shipped PNG; ``designer``: a name the server knows.

    ``deadline``: seconds since the epoch after which nobody waits for it; ``None``: somebody does.
    ``streamed``: somebody reads along.
    """

    designer: str
    image: Shipped
    instruction: str
    deadline: float | None = None
    streamed: bool = False


@dataclass(frozen=True, kw_only=True)
class ReviewJob:
    """A painted image to look at: encoded, as the source ``image`` is, which is shipped.

    ``designer``, ``deadline``: as of ``DesignJob``. ``plan``: what was painted from.
    """

    designer: str
    instruction: str
    plan: str
    image: Shipped
    painted: bytes
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class PaintJob:
    """What edits and generations have in common.

    ``deadline``: as of ``DesignJob``. ``negative_prompt``: what to paint away from. ``previews``:
    how many partial images, spread evenly over the steps. ``output``: the file that is made of the
    image, and of each preview. ``batch``: it stands behind those that somebody waits for.
    ``adapter``: of the server's, by name.
    """

    seed: int
    steps: int
    guidance_scale: float
    deadline: float | None = None
    negative_prompt: str | None = None
    previews: int = 0
    output: Output = PNG
    batch: bool = False
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True)
class EditJob(PaintJob):
    """One edit to paint from ``text`` (a blueprint, or the instruction).

    ``image``: a shipped PNG. ``fit``: all of it at its own size, or its middle square at the
    model's. ``mask``: PNG bytes of mode L and the image's size, 255 where it may change; ``None``:
    anywhere.
    """

    image: Shipped
    text: str
    fit: Fit
    mask: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class GenerateJob(PaintJob):
    """One image to paint from ``prompt``. ``size``: (width, height) in pixels."""

    prompt: str
    size: tuple[int, int]


@dataclass(frozen=True)
class Preview:
    """What an image looks like before it is finished, the ``number``-th, as its job's output."""

    number: int
    data: bytes


@dataclass(frozen=True)
class Painted:
    """A painted image as its job's output.

    ``batch_size``: how many images shared its forward passes. ``text_tokens``: as which the
    understanding model read what it was painted from. ``release``: what painted it, see
    ``serving.release``. ``waited_s``, ``painted_s``: how long it waited for a place, and then until
    it was finished.
    """

    data: bytes
    batch_size: int
    text_tokens: int
    release: str
    waited_s: float = 0.0
    painted_s: float = 0.0


@dataclass(frozen=True)
class Defaults:
    """What the served model does unless a request says otherwise.

    ``resolution``: side of a square edit, in pixels. ``size_multiple``: what the sides of an image
    whose size is asked for must be multiples of (pixels per token of the painter).
    ``image_tokens``: as which the understanding model sees a source, whatever its size.
    ``edits``: whether it can edit. ``release``, ``model_hash``: see ``serving.release``.
    """

    resolution: int
    size_multiple: int
    steps: int
    guidance_scale: float
    image_tokens: int
    edits: bool
    release: str
    model_hash: str


JobT = TypeVar("JobT")
ResultT = TypeVar("ResultT")


def in_groups(
    jobs: Sequence[JobT],
    key: Callable[[JobT], object],
    work: Callable[[Sequence[JobT]], Sequence[ResultT | Exception]],
) -> list[ResultT | Exception]:
    """Do ``jobs`` in groups of equal ``key``, keeping their order in the result.

    A group that fails as a whole is done again one by one, so that one bad job takes only itself
    down; its error is its result.
    """
    groups: dict[object, list[int]] = {}
    for index, job in enumerate(jobs):
        groups.setdefault(key(job), []).append(index)
    results: dict[int, ResultT | Exception] = {}
    for indices in groups.values():
        done = _attempt([jobs[index] for index in indices], work)
        results.update(zip(indices, done, strict=True))
    return [results[index] for index in range(len(jobs))]


def _attempt(
    group: Sequence[JobT], work: Callable[[Sequence[JobT]], Sequence[ResultT | Exception]]
) -> list[ResultT | Exception]:
    try:
        return list(work(group))
    except Exception as error:
        if len(group) == 1:
            return [error]
        return [_attempt([job], work)[0] for job in group]


def unwrap(result: ResultT | Exception) -> ResultT:
    """The result, or its error raised in the request that it belongs to."""
    if isinstance(result, DimError):
        raise result
    if isinstance(result, Exception):
        raise RuntimeError(f"{type(result).__name__}: {result}") from result
    return result
