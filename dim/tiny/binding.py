"""A helper of the understanding model's training: a phrase's last words know the whole phrase.

Next-token prediction does not need "top left" to remember that it is the place of a large red
circle, so a small model forgets it; yet that is what a painter's attention looks for when it asks
what belongs in a place. A linear head on the last hidden states says it. The head is thrown away
after the training.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.tabletop import COLOURS, PLACES, SHAPES, SIZES

_NAMES = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES))
_PHRASE = re.compile(
    f"({'|'.join(SIZES)}) ({'|'.join(COLOURS)}) ({'|'.join(SHAPES)}), "
    f"({'|'.join(sorted(PLACES, key=len, reverse=True))})"
)


class Mention(NamedTuple):
    """A token that ends a phrase, and what the phrase says: size, colour, shape, place.

    The numbers count from 1 in the world's lists; 0 = not said yet.
    """

    token: int
    words: list[int]


class Binding(nn.Module):
    """Linear classifiers of tokens that end a phrase about a thing.

    Args:
        hidden_size: features of a hidden state.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.classes = [len(names) + 1 for names in _NAMES]
        self.head = nn.Linear(hidden_size, sum(self.classes))

    def loss(self, states: Tensor, words: Tensor) -> Tensor:
        """Mean cross-entropy over the words of all mentions.

        Args:
            states: hidden states of the mentions' tokens, (M, hidden_size).
            words: their words, (M, 4) int64.
        """
        answers = self.head(states.float()).split(self.classes, dim=1)
        losses = [cross_entropy(a, words[:, i]) for i, a in enumerate(answers)]
        return torch.stack(losses).mean()


def mentions(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Mention]:
    """Where ``text``, tokenised alone, has said a thing's shape and then its place."""
    ends = [
        end
        for _, end in tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
        ).offset_mapping
    ]
    found = []
    for match in _PHRASE.finditer(text):
        words = [1 + names.index(w) for names, w in zip(_NAMES, match.groups(), strict=True)]
        for group, said in ((3, [*words[:3], 0]), (4, words)):
            token = next(i for i, end in enumerate(ends) if end >= match.end(group))
            found.append(Mention(token, said))
    return found
