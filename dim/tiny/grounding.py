"""A helper of the understanding model's training: what each image token shows, and where it is.

Qwen2.5-VL's vision tower knows no absolute positions, and a small model takes many thousand steps
to find out from words alone that "top left" is a place in the image. A linear head on the image
tokens of a middle layer says it straight away. The head is thrown away after the training.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dim.tabletop import Scene, Thing
from dim.tiny.naming import WORDS, NamingHead, numbered

# A cell shows a thing of whose bounding square it covers at least this share.
_COVERED = 0.15


class Grounding(NamingHead):
    """Linear classifiers of image tokens: their cell, and the thing in it, if any.

    Args:
        hidden_size: features of an image token.
        side: image tokens along each side of the image.
    """

    def __init__(self, hidden_size: int, side: int) -> None:
        super().__init__(hidden_size, before=(side * side,))
        self.side = side

    def loss(self, states: Tensor, scenes: list[Scene]) -> Tensor:
        """Mean cross-entropy of every question about every cell.

        Args:
            states: (number of scenes * side * side, hidden_size), row by row of each image.
            scenes: what the images show.
        """
        labels = torch.tensor([label for scene in scenes for label in self._labels(scene)])
        return self.mean_loss(states, labels)

    def _labels(self, scene: Scene) -> list[list[int]]:
        """Of each cell its number and the size, colour, shape and place in it; 0 is nothing."""
        labels = []
        for cell in range(self.side * self.side):
            shares = [(self._share(thing, cell), thing) for thing in scene.objects]
            share, shown = max(shares, key=lambda item: item[0], default=(0.0, None))
            words = [0] * len(WORDS)
            if shown is not None and share >= _COVERED:
                words = numbered(shown.size, shown.colour, shown.shape, shown.place)
            labels.append([cell, *words])
        return labels

    def _share(self, thing: Thing, cell: int) -> float:
        """How much of the bounding square of ``thing`` lies in ``cell``."""
        row, column = divmod(cell, self.side)
        share = 1.0
        for centre, index in ((thing.x, column), (thing.y, row)):
            start, end = index / self.side, (index + 1) / self.side
            inside = min(end, centre + thing.radius) - max(start, centre - thing.radius)
            share *= max(0.0, inside) / (2 * thing.radius)
        return share
