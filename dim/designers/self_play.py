"""Self-play: the painter's own understanding module writes the blueprint it is conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image

from dim.config import load_config
from dim.designers.base import DesignRequest, OnAnswer, Reply
from dim.errors import DesignerError, DimError, InputError
from dim.images import decode_image
from dim.model import parts
from dim.model.conditioner import OnText
from dim.model.config import UnderstandingConfig, weights_path
from dim.model.understanding import Understanding

WEIGHTS = "package:tiny/understanding"
SETTINGS = "package:tiny/understanding.json"


class Understands(Protocol):
    """What can design: a :class:`dim.model.DIM`, or its understanding model alone."""

    def design(
        self,
        images: Sequence[Image.Image],
        instructions: Sequence[str],
        on_text: OnText | None = None,
    ) -> list[str]:
        """One answer per image and instruction."""
        ...


def shipped() -> Understanding:
    """The understanding model that comes with this package, by itself.

    Raises:
        CheckpointError: its weights are not installed.
    """
    config = load_config(UnderstandingConfig, weights_path(SETTINGS), [f"weights={WEIGHTS}"])
    return Understanding(parts.conditioner(config), config)


class SelfDesigner:
    """Designs with a model's own frozen vision-language model, without a network or a key.

    Args:
        model: such as a :class:`dim.model.DIM`; weights are shared with whoever else holds it.
        name: what records call this designer.
    """

    costly = False

    def __init__(self, model: Understands, *, name: str = "self") -> None:
        self._model = model
        self.name = self.fingerprint = name

    def design(
        self,
        requests: Sequence[DesignRequest],
        *,
        on_answer: OnAnswer | None = None,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`. Readable requests make one batch.

        ``on_text`` is told a request's place and its answer so far, while they are written.
        """
        replies: dict[int, Reply] = {}
        images: dict[int, Image.Image] = {}
        for place, request in enumerate(requests):
            try:
                images[place] = decode_image(request.image)
            except InputError as error:
                replies[place] = DesignerError(str(error))
        places = list(images)
        instructions = [requests[place].instruction for place in places]
        told = None if on_text is None else lambda row, text: on_text(places[row], text)
        answers = self._answer(list(images.values()), instructions, told)
        replies.update(zip(images, answers, strict=True))
        for place, reply in replies.items():
            if on_answer is not None and isinstance(reply, str):
                on_answer(place, reply)
        return [replies[place] for place in range(len(requests))]

    def _answer(
        self, images: list[Image.Image], instructions: list[str], on_text: OnText | None
    ) -> list[Reply]:
        if not images:
            return []
        try:
            if on_text is None:
                return list(self._model.design(images, instructions))
            return list(self._model.design(images, instructions, on_text))
        except DimError as error:
            return [DesignerError(str(error)) for _ in images]
