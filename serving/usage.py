"""How many tokens a request is, as the models count them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from dim.model.sizes import Size
from serving.protocol import TokenDetails, Usage

if TYPE_CHECKING:
    from dim.model import DIM


@dataclass(frozen=True)
class Tokens:
    """Those of one image: of the texts and the source that are read for it, and its own."""

    text: int
    image: int
    painted: int

    def of(self, images: int) -> Usage:
        """OpenAI's usage of ``images`` from the same texts and source."""
        painted = self.painted * images
        return Usage(
            input_tokens=self.text + self.image,
            input_tokens_details=TokenDetails(text_tokens=self.text, image_tokens=self.image),
            output_tokens=painted,
            output_tokens_details=TokenDetails(text_tokens=0, image_tokens=painted),
            total_tokens=self.text + self.image + painted,
        )


def image_tokens(model: DIM) -> int:
    """Tokens as which the understanding model sees a source; every source is one square to it."""
    grid = model.conditioner.patches(Image.new("RGB", (8, 8))).grid
    return int(grid.prod()) // int(model.conditioner.image_processor.merge_size) ** 2


def text_tokens(model: DIM, texts: Sequence[str]) -> int:
    """Tokens of ``texts`` together, those that are cut off left out."""
    conditioner = model.conditioner
    prompts = [conditioner.chat.prompt(text) for text in texts if text.strip()]
    return sum(
        min(prompt.end - prompt.text, conditioner.max_condition_tokens) for prompt in prompts
    )


def painted_tokens(size: Size, cell: int) -> int:
    """Tokens of an image that the painter denoises, of (width, height) in pixels."""
    return (size[0] // cell) * (size[1] // cell)
