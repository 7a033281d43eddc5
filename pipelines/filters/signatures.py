"""Signatures: what duplicates across a whole data set are found by, without its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from dim.records import short_hash
from pipelines.filters import measures, scorers
from pipelines.outcome import Row


@dataclass(frozen=True)
class Signer:
    """Adds to a record the columns of :data:`pipelines.filters.duplicates.SIGNATURE` that match it.

    Args:
        embedding_model: folder of a CLIP or DINO model; its embeddings are noted too.
    """

    embedding_model: str | None = None

    def sign_image(self, row: Row, image: Image.Image) -> Row:
        """The signature of a single image; its words do not matter."""
        return self._sign(0, image)

    def sign_pair(self, row: Row, source: Image.Image, target: Image.Image) -> Row:
        """The signature of a pair: both images, and the instruction but for case and spaces."""
        words = " ".join(row["instruction"].casefold().split())
        return self._sign(int.from_bytes(short_hash(words), "big"), source, target)

    def _sign(self, text: int, *images: Image.Image) -> Row:
        signature: Row = {
            "text_key": text,
            "hashes": [measures.perceptual_hash(image) for image in images],
        }
        if self.embedding_model is not None:
            embedder = scorers.embedder(self.embedding_model)
            embeddings = np.stack([embedder.embed(image) for image in images])
            signature["embeddings"] = embeddings.astype(np.float16).tobytes()
        return signature
