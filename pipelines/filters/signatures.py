"""Signatures: what duplicates across a whole data set are found by, without its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from dim.records import short_hash
from pipelines.filters import measures
from pipelines.outcome import Row


@dataclass(frozen=True)
class Signer:
    """Adds to a record the columns of :data:`pipelines.filters.duplicates.SIGNATURE` that match it.

    Args:
        embedding_model: folder of a CLIP or DINO model, which adds its embeddings.
    """

    embedding_model: str | None = None

    def sign_image(self, image: Image.Image) -> Row:
        """The signature of a single image; its words do not matter."""
        return _signature(0, image)

    def sign_pair(self, instruction: str, source: Image.Image, target: Image.Image) -> Row:
        """The signature of a pair: both images, and the instruction but for case and spaces."""
        words = " ".join(instruction.casefold().split())
        return _signature(int.from_bytes(short_hash(words), "big"), source, target)


def _signature(text: int, *images: Image.Image) -> Row:
    return {"text_key": text, "hashes": [measures.perceptual_hash(image) for image in images]}
