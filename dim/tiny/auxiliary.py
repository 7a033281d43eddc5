"""Auxiliary losses of the understanding model's training; their heads are thrown away after it.

Grounding: what each image token shows, and where it is. Qwen2.5-VL's vision tower knows no absolute
positions, and a small model takes many thousand steps to find out from words alone that "top left"
is a place in the image. A linear head on the image tokens of a middle layer says it straight away.

Binding: a phrase's last words know the whole phrase. Next-token prediction does not need "top left"
to remember that it is the place of a large red circle, so a small model forgets it; yet that is
what a painter's attention looks for when it asks what belongs in a place. A linear head on the last
hidden states says it.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.tabletop import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from dim.tabletop.references import alternatives

WORDS = (tuple(SIZES), tuple(COLOURS), SHAPES, tuple(PLACES))

# A cell shows a thing of whose bounding square it covers at least this share.
_COVERED = 0.15
_PHRASE = re.compile("({}) ({}) ({}), ({})".format(*map(alternatives, WORDS)))


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

    def loss(self, states: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of every question about every state.

        Args:
            states: (M, hidden_size).
            labels: (M, questions) int64.
        """
        answers = self.head(states.float()).split(self.classes, dim=1)
        losses = [cross_entropy(a, labels[:, i]) for i, a in enumerate(answers)]
        return torch.stack(losses).mean()


class AuxiliaryHeads(NamedTuple):
    """``grounding`` is asked for a cell's number first, see ``cell_labels``."""

    grounding: NamingHead
    binding: NamingHead


def auxiliary_heads(hidden_size: int, side: int) -> AuxiliaryHeads:
    """Random heads for images of ``side`` by ``side`` tokens."""
    return AuxiliaryHeads(NamingHead(hidden_size, before=(side * side,)), NamingHead(hidden_size))


def cell_labels(scenes: list[Scene], side: int) -> Tensor:
    """What each of an image's ``side`` by ``side`` tokens shows: (scenes * side * side, 5) int64.

    Row by row of each image: its number, and the size, colour, shape and place in it; 0 is nothing.
    """
    return torch.tensor([label for scene in scenes for label in _labels(scene, side)])


class Mention(NamedTuple):
    """A token that ends a phrase, and what the phrase says: size, colour, shape, place.

    The numbers count from 1 in the world's lists; 0 = not said yet.
    """

    token: int
    words: list[int]


def mentions(text: str, tokenizer: PreTrainedTokenizerBase) -> list[Mention]:
    """Where ``text``, tokenised alone, has said a thing's shape and then its place."""
    spans = tokenizer(
        text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True
    ).offset_mapping
    found = []
    for match in _PHRASE.finditer(text):
        words = _numbered(*match.groups())
        for group, said in ((3, [*words[:3], 0]), (4, words)):
            token = next(i for i, (_, end) in enumerate(spans) if end >= match.end(group))
            found.append(Mention(token, said))
    return found


def _numbered(size: str, colour: str, shape: str, place: str) -> list[int]:
    """Each word's number in the world's list of its kind, counted from 1; 0 is left for none."""
    named = (size, colour, shape, place)
    return [1 + words.index(word) for words, word in zip(WORDS, named, strict=True)]


def _labels(scene: Scene, side: int) -> list[list[int]]:
    labels = []
    for cell in range(side * side):
        shares = [(_share(thing, cell, side), thing) for thing in scene.objects]
        share, shown = max(shares, key=lambda item: item[0], default=(0.0, None))
        words = [0] * len(WORDS)
        if shown is not None and share >= _COVERED:
            words = _numbered(shown.size, shown.colour, shown.shape, shown.place)
        labels.append([cell, *words])
    return labels


def _share(thing: Thing, cell: int, side: int) -> float:
    """How much of the bounding square of ``thing`` lies in ``cell``."""
    row, column = divmod(cell, side)
    share = 1.0
    for centre, index in ((thing.x, column), (thing.y, row)):
        start, end = index / side, (index + 1) / side
        inside = min(end, centre + thing.radius) - max(start, centre - thing.radius)
        share *= max(0.0, inside) / (2 * thing.radius)
    return share
