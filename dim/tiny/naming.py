"""What the helpers of the understanding model's training share: things as numbers, and the head."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dim.tabletop import COLOURS, PLACES, SHAPES, SIZES

WORDS = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES))


def numbered(size: str, colour: str, shape: str, place: str) -> list[int]:
    """Each word's number in the world's list of its kind, counted from 1; 0 is left for none."""
    named = (size, colour, shape, place)
    return [1 + words.index(word) for words, word in zip(WORDS, named, strict=True)]


class NamingHead(nn.Module):
    """Linear classifiers over one hidden state: the four words of a thing, or none of each.

    Args:
        hidden_size: features of a hidden state.
        before: numbers of classes of further questions, asked before the words.
    """

    def __init__(self, hidden_size: int, before: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.classes = [*before, *(len(words) + 1 for words in WORDS)]
        self.head = nn.Linear(hidden_size, sum(self.classes))

    def mean_loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of every question about every state.

        Args:
            states: (M, hidden_size).
            labels: (M, questions) int64.
        """
        answers = self.head(states.float()).split(self.classes, dim=1)
        losses = [cross_entropy(a, labels[:, i]) for i, a in enumerate(answers)]
        return torch.stack(losses).mean()
