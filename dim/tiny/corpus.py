"""What the tiny models are pretrained on: tabletop images and everything that is said of them.

Sample ``i`` of a stream is drawn from ``(seed, stream, i)`` alone, so a build is the same whenever
and in whatever order its samples are made. Streams of training and evaluation never meet.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dim import tabletop
from dim.tabletop import Edit, Scene
from dim.tiny.config import TinyBuildConfig, UnderstandingPartConfig

CAPTION_REQUEST = "describe the image"
STREAMS = {"autoencoder": 1, "understanding": 2, "painter": 3, "tokenizer": 4, "evaluation": 9}


@dataclass(frozen=True)
class Conversation:
    """One training text: an optional image, the user's words, and the assistant's, if any."""

    scene: Scene | None
    user: str
    assistant: str | None


def generator(config: TinyBuildConfig, stream: str, index: int) -> np.random.Generator:
    """The source of randomness of one sample."""
    return np.random.default_rng([config.seed, STREAMS[stream], index])


def edit(config: TinyBuildConfig, stream: str, index: int) -> Edit:
    """Edit ``index`` of a stream."""
    rng = generator(config, stream, index)
    return tabletop.sample_edit(
        rng, kinds=config.kinds, referential=config.referential, objects=config.objects
    )


def conversation(
    config: TinyBuildConfig, part: UnderstandingPartConfig, index: int, progress: float
) -> Conversation:
    """Text ``index`` of the understanding model's training, at ``progress`` in [0, 1]."""
    rng = generator(config, "understanding", index)
    sample = tabletop.sample_edit(
        rng, kinds=config.kinds, referential=config.referential, objects=config.objects
    )
    text_only = part.text_only_start if progress < part.text_only_until else part.text_only
    form, aside = rng.random(2)
    if form < text_only:
        return _in_words(sample)
    if form < text_only + (1 - text_only) * part.captions:
        return _caption(sample, aside)
    blueprint = sample.blueprint.render()
    if aside < 0.3:
        # What a painter is conditioned on: image and blueprint as the user's own words.
        return Conversation(sample.source, blueprint, None)
    return Conversation(sample.source, sample.instruction, blueprint)


def tokenizer_texts(config: TinyBuildConfig) -> Iterator[str]:
    """Texts of every form to learn the vocabulary from."""
    for index in range(config.understanding.tokenizer_texts):
        sample = edit(config, "tokenizer", index)
        yield tabletop.caption(sample.source)
        yield sample.instruction
        yield sample.blueprint.render()
    yield CAPTION_REQUEST


def _in_words(sample: Edit) -> Conversation:
    """The scene as words instead of an image: what copying and reasoning are learnt from."""
    user = f"{tabletop.caption(sample.source)}\n{sample.instruction}"
    return Conversation(None, user, sample.blueprint.render())


def _caption(sample: Edit, aside: float) -> Conversation:
    """A description of an image, of the edited one too; a third in the form of a T2I prompt."""
    scene = sample.target if aside < 0.5 else sample.source
    if aside % 0.5 < 0.15:
        return Conversation(None, tabletop.caption(scene), None)
    return Conversation(scene, CAPTION_REQUEST, tabletop.caption(scene))
