"""Models that look at pictures: classifiers, aesthetic heads and embeddings, from local folders.

A model is loaded once per process, at its first picture. Pictures are scored one at a time, so
that what is said of one does not depend on its neighbours in a batch.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError

_HELD = 4  # models of a kind, in one process


class Embedder:
    """A folder of a CLIP or DINO model as unit-length embeddings of pictures."""

    def __init__(self, path: str) -> None:
        from transformers import AutoImageProcessor, AutoModel

        check_folder(path)
        self._processor = _load(path, AutoImageProcessor.from_pretrained, backend="pil")
        self._model = _load(path, AutoModel.from_pretrained).eval()

    def embed(self, image: Image.Image) -> NDArray[np.float32]:
        """The embedding (D,) of an RGB picture: CLIP's projected one, else the pooled token."""
        import torch

        with torch.inference_mode():
            pixels = _pixels(self._processor, self._model, image)
            # CLIP also has a text tower, which its plain call would want a text for.
            look = getattr(self._model, "get_image_features", self._model)
            pooled = look(pixel_values=pixels).pooler_output[0].float()
            return torch.nn.functional.normalize(pooled, dim=0).numpy()


class Classifier:
    """A folder of an image classifier as the probability of one of its labels.

    Raises:
        InputError: it does not know the label.
    """

    def __init__(self, path: str, label: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        check_folder(path)
        self._processor = _load(path, AutoImageProcessor.from_pretrained, backend="pil")
        self._model = _load(path, AutoModelForImageClassification.from_pretrained).eval()
        labels = self._model.config.label2id
        if label not in labels:
            raise InputError(f"the model {path} has no label {label!r}; it has {sorted(labels)}")
        self._place = labels[label]

    def score(self, image: Image.Image) -> float:
        """The label's probability for an RGB picture."""
        import torch

        with torch.inference_mode():
            pixels = _pixels(self._processor, self._model, image)
            return float(self._model(pixels).logits[0].float().softmax(-1)[self._place])


class Aesthetic:
    """A linear head over a CLIP model's unit-length embedding.

    Raises:
        InputError: the head is not a safetensors file of a fitting ``weight`` and a ``bias``.
    """

    def __init__(self, path: str, head: str) -> None:
        from safetensors.numpy import load_file

        self._embedder = embedder(path)
        try:
            tensors = load_file(head)
            self._weight = tensors["weight"].reshape(-1).astype(np.float64)
            self._bias = float(tensors["bias"].reshape(()))
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{head} is no linear head in safetensors: {error}") from None
        self._head = head

    def score(self, image: Image.Image) -> float:
        """What the head says of an RGB picture."""
        embedding = self._embedder.embed(image)
        if embedding.shape != self._weight.shape:
            raise InputError(
                f"{self._head} is for {self._weight.size} features and the model gives "
                f"{embedding.size}"
            )
        return float(embedding @ self._weight + self._bias)


embedder = lru_cache(_HELD)(Embedder)
"""The embedder of a folder, loaded once per process."""
classifier = lru_cache(_HELD)(Classifier)
"""The classifier of a folder and label, loaded once per process."""
aesthetic = lru_cache(_HELD)(Aesthetic)
"""The aesthetic model of a folder and head, loaded once per process."""


def check_folder(path: str) -> None:
    """See that ``path`` is a model's folder.

    Raises:
        InputError: it is not.
    """
    if not (Path(path) / "config.json").is_file():
        raise InputError(f"{path} is no folder of a transformers model (it has no config.json)")


def _load(path: str, load: Callable[..., Any], **options: Any) -> Any:
    try:
        return load(path, local_files_only=True, **options)
    except Exception as error:  # transformers raises nearly anything on a damaged folder
        said = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"the model {path} cannot be loaded: {said}") from None


def _pixels(processor: Any, model: Any, image: Image.Image) -> Any:
    """A picture as the model wants it: (1, 3, H, W)."""
    return processor(images=image, return_tensors="pt")["pixel_values"].to(model.dtype)
