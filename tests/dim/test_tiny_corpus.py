"""What the tiny models are taught: deterministic, held-out apart, every form of text."""

from __future__ import annotations

from pathlib import Path

import pytest

from dim.blueprint import Blueprint
from dim.config import load_config
from dim.tiny import corpus
from dim.tiny.config import TinyBuildConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config() -> TinyBuildConfig:
    return load_config(TinyBuildConfig, ROOT / "configs" / "tiny-build.yaml")


def test_samples_depend_on_seed_stream_and_index_only(config: TinyBuildConfig) -> None:
    first = [corpus.edit(config, "autoencoder", i) for i in range(10)]
    assert first == [corpus.edit(config, "autoencoder", i) for i in range(10)]
    assert first != [corpus.edit(config, "evaluation", i) for i in range(10)]
    other = config.model_copy(update={"seed": 1})
    assert first != [corpus.edit(other, "autoencoder", i) for i in range(10)]


def test_conversations_have_every_form(config: TinyBuildConfig) -> None:
    part = config.understanding
    texts = [corpus.conversation(config, part, i, progress=0.5) for i in range(300)]
    words_only = [text for text in texts if text.scene is None and text.assistant]
    designs = [text for text in texts if text.scene and text.assistant and "1. " in text.assistant]
    conditions = [text for text in texts if text.scene and text.assistant is None]
    captions = [text for text in texts if text.user == corpus.CAPTION_REQUEST]
    prompts = [text for text in texts if text.scene is None and text.assistant is None]
    for form in (words_only, designs, conditions, captions, prompts):
        assert len(form) > 5
    for text in designs:
        assert text.assistant is not None
        assert Blueprint.parse(text.assistant).instruction == text.user
    for text in conditions:
        assert Blueprint.parse(text.user).render() == text.user


def test_more_words_in_the_beginning(config: TinyBuildConfig) -> None:
    def in_words(progress: float) -> int:
        texts = [corpus.conversation(config, config.understanding, i, progress) for i in range(300)]
        return sum(text.scene is None and text.assistant is not None for text in texts)

    assert in_words(0.0) > 2 * in_words(0.9)
