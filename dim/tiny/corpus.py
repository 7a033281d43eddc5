"""What the tiny models are pretrained on: tabletop images and everything that is said of them.

Sample ``i`` of a stream is drawn from ``(seed, stream, i)`` alone, so a build is the same whenever
and in whatever order its samples are made. Streams of training and evaluation never meet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dim import tabletop
from dim.tabletop import Edit, Scene
from dim.tiny.config import TinyBuildConfig, UnderstandingPartConfig

CAPTION_REQUEST = "describe the image"
LOOK_REQUEST = "look at every place"
STREAMS = {
    "autoencoder": 1,
    "understanding": 2,
    "painter": 3,
    "tokenizer": 4,
    "binding": 5,
    "evaluation": 9,
}


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
    config: TinyBuildConfig,
    part: UnderstandingPartConfig,
    index: int,
    progress: float,
    stream: str = "understanding",
) -> Conversation:
    """Text ``index`` of the understanding model's training, at ``progress`` in [0, 1]."""
    rng = generator(config, stream, index)
    sample = tabletop.sample_edit(
        rng, kinds=config.kinds, referential=config.referential, objects=config.objects
    )
    shares = part.early if progress < part.early_until else part.late
    form = str(rng.choice(list(shares), p=list(shares.values())))
    return _FORMS[form](sample, float(rng.random()))


def tokenizer_texts(config: TinyBuildConfig) -> Iterator[str]:
    """Texts of every form to learn the vocabulary from."""
    for index in range(config.understanding.tokenizer_texts):
        sample = edit(config, "tokenizer", index)
        yield tabletop.caption(sample.source)
        yield sample.instruction
        yield sample.blueprint.render()
        yield look(sample.target)
    yield CAPTION_REQUEST
    yield LOOK_REQUEST


def look(scene: Scene) -> str:
    """Each of the nine places in reading order, and what lies there."""
    lines = []
    for place in tabletop.PLACES:
        there = [f"{t.size} {t.colour} {t.shape}" for t in scene.objects if t.place == place]
        lines.append(f"{place}: {' and '.join(there) or 'nothing'}")
    return f"{tabletop.lay_out(scene)}. {'; '.join(lines)}"


def _in_words(sample: Edit, aside: float) -> Conversation:
    """The scene as words instead of an image: what copying and reasoning are learnt from."""
    user = f"{tabletop.caption(sample.source)}\n{sample.instruction}"
    return Conversation(None, user, sample.blueprint.render())


def _look(sample: Edit, aside: float) -> Conversation:
    """What lies where, empty places included: seeing is learnt before listing."""
    return Conversation(_either(sample, aside), LOOK_REQUEST, look(_either(sample, aside)))


def _caption(sample: Edit, aside: float) -> Conversation:
    scene = _either(sample, aside)
    return Conversation(scene, CAPTION_REQUEST, tabletop.caption(scene))


def _prompt(sample: Edit, aside: float) -> Conversation:
    """What a painter is conditioned on: captions, or image and blueprint, as the user's words."""
    if aside < 0.5:
        return Conversation(None, tabletop.caption(sample.target), None)
    return Conversation(sample.source, sample.blueprint.render(), None)


def _design(sample: Edit, aside: float) -> Conversation:
    return Conversation(sample.source, sample.instruction, sample.blueprint.render())


def _either(sample: Edit, aside: float) -> Scene:
    return sample.target if aside < 0.5 else sample.source


_FORMS: dict[str, Callable[[Edit, float], Conversation]] = {
    "words": _in_words,
    "look": _look,
    "caption": _caption,
    "prompt": _prompt,
    "design": _design,
}
