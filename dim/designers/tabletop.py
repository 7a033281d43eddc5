"""The oracle: reads a tabletop image, knows what an instruction means on it, and writes it down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from dim import tabletop
from dim.design import ReviewRequest
from dim.designers.base import DesignRequest, OnAnswer, Reply, answer_each
from dim.errors import DesignerError, InputError
from dim.images import decode_image
from dim.records import sha256_hex, short_hash
from dim.review import BEST, Review

# A target is the expected one if no 4x4-pixel patch is further off than this (8-bit levels). The
# source is read to a quarter of a pixel, which costs at most 2.5; one wrong small shape costs 8.
_PATCH = 4
_SAME = 4.0


class TabletopOracle:
    """Perfect designer of the tabletop world. Given a target, it also triages the pair."""

    name = fingerprint = "oracle"
    costly = False

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`."""
        return answer_each(requests, _plan, on_answer)

    def review(self, requests: Sequence[ReviewRequest]) -> list[Reply]:
        """See :meth:`dim.design.Reviews.review`: accepts what the checker finds to be exact."""
        return answer_each(requests, _review)


class NoisyOracle:
    """A designer that means well: some of its plans are of another edit of the same kind.

    It keeps the user's words, sees the scene, and picks the wrong thing, place or attribute.

    Args:
        share: of the plans that are wrong, from 0 to 1. Which ones are, the request decides.
    """

    costly = False

    def __init__(self, share: float) -> None:
        self.name = self.fingerprint = f"noisy:{share:g}"
        self._share = share

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`."""
        return answer_each(requests, self._plan, on_answer)

    def _plan(self, request: DesignRequest) -> str:
        edit = tabletop.understand(_read(request.image), request.instruction)
        seed = short_hash(f"{request.instruction} {sha256_hex(request.image)}")
        rng = np.random.default_rng(int.from_bytes(seed, "big"))
        if rng.random() >= self._share:
            return edit.blueprint.render()
        try:
            other = tabletop.another_edit(rng, edit)
        except InputError:  # on a table on which there is only one such edit, nobody errs
            return edit.blueprint.render()
        return replace(other.blueprint, instruction=request.instruction).render()


class TabletopCaptioner:
    """Describes a tabletop image completely."""

    name = fingerprint = "oracle"
    costly = False

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """See :meth:`dim.designers.Captioner.caption`."""
        requests = [DesignRequest("", image) for image in images]
        return answer_each(requests, lambda r: tabletop.caption(_read(r.image)), on_answer)


def _plan(request: DesignRequest) -> str:
    edit = tabletop.understand(_read(request.image), request.instruction)
    if request.target is None:
        return edit.blueprint.render()
    if not _shows(decode_image(request.target, name="the target"), edit.target):
        return "Alignment: misaligned"
    return f"Alignment: aligned\n\n{edit.blueprint.render()}"


def _review(request: ReviewRequest) -> str:
    edit = tabletop.understand(_read(request.image), request.instruction)
    painted = decode_image(request.painted, name="the painted image")
    judged = tabletop.judge(painted, edit.target, edit.source)
    if judged.exact:
        drawn = judged.overlap * (1 - judged.drift)
        return Review(True, BEST / 2 * (1 + drawn)).render()
    shown = tabletop.read(painted).scene
    missing = f"the image shows: {tabletop.caption(shown)} It should show: "
    score = BEST / 2 * _alike(shown, edit.target)
    return Review(False, score, missing + tabletop.caption(edit.target)).render()


def _alike(one: tabletop.Scene, other: tabletop.Scene) -> float:
    """Share of what is in one of the scenes that is in both, the table included."""
    parts = [
        Counter([scene.background, *((t.shape, t.colour, t.size, t.place) for t in scene.objects)])
        for scene in (one, other)
    ]
    return (parts[0] & parts[1]).total() / (parts[0] | parts[1]).total()


def _shows(image: Image.Image, scene: tabletop.Scene) -> bool:
    """Whether ``image`` is of ``scene``: at a glance where that is enough, else read properly."""
    expected = tabletop.render(scene, image.size)
    off = np.abs(np.asarray(image, np.float32) - np.asarray(expected, np.float32)).mean(axis=-1)
    height, width = (side - side % _PATCH for side in off.shape)
    patches = off[:height, :width].reshape(height // _PATCH, _PATCH, width // _PATCH, _PATCH)
    return bool(patches.mean(axis=(1, 3)).max() < _SAME) or tabletop.exact(image, scene)


def _read(image: bytes) -> tabletop.Scene:
    try:
        reading = tabletop.read(decode_image(image))
    except InputError as error:
        raise DesignerError(f"the oracle cannot read this image: {error}") from None
    if reading.unknown:
        raise DesignerError(
            f"the oracle cannot read this image: {reading.unknown} of its objects are not of the "
            "tabletop world"
        )
    return reading.scene
