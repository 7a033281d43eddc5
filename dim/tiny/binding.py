"""A helper of the understanding model's training: a phrase's last words know the whole phrase.

Next-token prediction does not need "top left" to remember that it is the place of a large red
circle, so a small model forgets it; yet that is what a painter's attention looks for when it asks
what belongs in a place. A linear head on the last hidden states says it. The head is thrown away
after the training.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from torch import Tensor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.tabletop.references import alternatives
from dim.tiny.naming import WORDS, NamingHead, numbered

_PHRASE = re.compile("({}) ({}) ({}), ({})".format(*map(alternatives, WORDS)))


class Mention(NamedTuple):
    """A token that ends a phrase, and what the phrase says: size, colour, shape, place.

    The numbers count from 1 in the world's lists; 0 = not said yet.
    """

    token: int
    words: list[int]


class Binding(NamingHead):
    """Linear classifiers of tokens that end a phrase about a thing."""

    def loss(self, states: Tensor, words: Tensor) -> Tensor:
        """Mean cross-entropy over the words of all mentions.

        Args:
            states: hidden states of the mentions' tokens, (M, hidden_size).
            words: their words, (M, 4) int64.
        """
        return self.mean_loss(states, words)


def mentions(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Mention]:
    """Where ``text``, tokenised alone, has said a thing's shape and then its place."""
    spans = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    ).offset_mapping
    found = []
    for match in _PHRASE.finditer(text):
        words = numbered(*match.groups())
        for group, said in ((3, [*words[:3], 0]), (4, words)):
            token = next(i for i, (_, end) in enumerate(spans) if end >= match.end(group))
            found.append(Mention(token, said))
    return found
