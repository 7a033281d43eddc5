"""Models that look at pictures: classifiers, aesthetic heads and embeddings, from local folders.

A model is loaded once per process, when it is first needed. On a GPU it looks at pictures in
batches of one size, which blank ones fill up; on a processor, where a batch is no quicker, at one
after another. So what is said of a picture does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dim.errors import InputError

_HELD = 4  # models of a kind, in one process
_AT_ONCE = {"cpu": 1, "cuda": 32}  # pictures

Pixels = NDArray[np.float32]
"""A picture as a model wants it: (3, H, W)."""


class Embedder:
    """A folder of a CLIP or DINO model as unit-length embeddings of pictures.

    Args:
        path: of the folder.
        device: ``cpu`` or ``cuda``.

    Raises:
        InputError: it cannot be loaded, or there is no such device.
    """

    def __init__(self, path: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModel

        check_folder(path)
        self._processor = _load(path, AutoImageProcessor.from_pretrained, backend="pil")
        self._model = _placed(_load(path, AutoModel.from_pretrained), device)

    def view(self, image: Image.Image) -> Pixels:
        """An RGB picture as the model wants it."""
        return _pixels(self._processor, image)

    def embed(self, views: Sequence[Pixels]) -> list[NDArray[np.float32]]:
        """The embedding (D,) of each picture: CLIP's projected one, else the pooled token."""
        import torch

        # CLIP also has a text tower, which its plain call would want a text for.
        look = getattr(self._model, "get_image_features", self._model)

        def pooled(pixels: Any) -> Any:
            found = look(pixel_values=pixels).pooler_output.float()
            return torch.nn.functional.normalize(found, dim=1)

        return list(_in_batches(self._model, views, pooled))


class Classifier:
    """A folder of an image classifier as the probability of one of its labels.

    Raises:
        InputError: it does not know the label, it cannot be loaded, or there is no such device.
    """

    def __init__(self, path: str, label: str, device: str = "cpu") -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        check_folder(path)
        self._processor = _load(path, AutoImageProcessor.from_pretrained, backend="pil")
        model = _load(path, AutoModelForImageClassification.from_pretrained)
        labels = model.config.label2id
        if label not in labels:
            raise InputError(f"the model {path} has no label {label!r}; it has {sorted(labels)}")
        self._place = labels[label]
        self._model = _placed(model, device)

    def view(self, image: Image.Image) -> Pixels:
        """An RGB picture as the model wants it."""
        return _pixels(self._processor, image)

    def scores(self, views: Sequence[Pixels]) -> list[float]:
        """The label's probability for each picture."""
        found = _in_batches(
            self._model,
            views,
            lambda pixels: self._model(pixels).logits.float().softmax(-1)[:, self._place],
        )
        return [float(score) for score in found]


class Aesthetic:
    """A linear head over a CLIP model's unit-length embedding.

    Raises:
        InputError: the head is not a safetensors file of a fitting ``weight`` and a ``bias``.
    """

    def __init__(self, path: str, head: str, device: str = "cpu") -> None:
        from safetensors.numpy import load_file

        self._embedder = embedder(path, device)
        try:
            tensors = load_file(head)
            self._weight = tensors["weight"].reshape(-1).astype(np.float64)
            self._bias = float(tensors["bias"].reshape(()))
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(f"{head} is no linear head in safetensors: {error}") from None
        self._head = head

    def view(self, image: Image.Image) -> Pixels:
        """An RGB picture as the CLIP model wants it."""
        return self._embedder.view(image)

    def scores(self, views: Sequence[Pixels]) -> list[float]:
        """What the head says of each picture."""
        return [self._score(embedding) for embedding in self._embedder.embed(views)]

    def _score(self, embedding: NDArray[np.float32]) -> float:
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


def _placed(model: Any, device: str) -> Any:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("filters.gpus wants a GPU, and torch sees none on this machine")
    return model.eval().to(device)


def _pixels(processor: Any, image: Image.Image) -> Pixels:
    """A picture as a model's processor makes it."""
    return processor(images=image, return_tensors="np")["pixel_values"][0].astype(np.float32)


def _in_batches(
    model: Any, views: Sequence[Pixels], look: Callable[[Any], Any]
) -> NDArray[np.float32]:
    """What a model says of each of some pictures: (N, ...).

    Args:
        model: it.
        views: the pictures; all of one shape.
        look: from a batch (B, 3, H, W) to what is said of it (B, ...).
    """
    import torch

    size = _AT_ONCE[model.device.type]
    found = []
    with torch.inference_mode():
        for first in range(0, len(views), size):
            some = np.stack(views[first : first + size])
            filled = np.pad(some, ((0, size - len(some)), *((0, 0),) * 3))
            pixels = torch.from_numpy(filled).to(model.device, model.dtype)
            found.append(look(pixels)[: len(some)].cpu().numpy())
    return np.concatenate(found)
