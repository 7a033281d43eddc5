"""What the tiny models are taught: deterministic, held-out apart, every form of text."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from dim.blueprint import Blueprint
from dim.config import load_config
from dim.errors import ConfigError
from dim.model.conditioner import IMAGE_TYPE
from dim.model.config import ModelConfig
from dim.tabletop import COLOURS, SHAPES, Scene, Thing, sample_scene
from dim.tiny import corpus
from dim.tiny.auxiliary import auxiliary_heads, cell_labels, mentions
from dim.tiny.config import TinyBuildConfig
from dim.tiny.corpus import Conversation
from dim.tiny.understanding import _Batches, new_understanding

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
    looks = [text for text in texts if text.user == corpus.LOOK_REQUEST]
    prompts = [text for text in texts if text.scene is None and text.assistant is None]
    for form in (words_only, designs, conditions, captions, looks, prompts):
        assert len(form) > 5
    for text in designs:
        assert text.assistant is not None
        assert Blueprint.parse(text.assistant).instruction == text.user
    for text in conditions:
        assert Blueprint.parse(text.user).render() == text.user


def test_the_shares_of_the_forms_change_during_training(config: TinyBuildConfig) -> None:
    part = config.understanding.model_copy(
        update={"early_until": 0.5, "early": {"look": 1.0}, "late": {"words": 0.5, "caption": 0.5}}
    )

    def requests(progress: float) -> set[str]:
        texts = [corpus.conversation(config, part, i, progress) for i in range(40)]
        return {"words" if text.scene is None else text.user for text in texts}

    assert requests(0.49) == {corpus.LOOK_REQUEST}
    assert requests(0.5) == {"words", corpus.CAPTION_REQUEST}


def test_shares_that_do_not_sum_to_one_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"early.*sum to 1"):
        load_config(
            TinyBuildConfig,
            ROOT / "configs" / "tiny-build.yaml",
            ["understanding.early={look: 0.5}"],
        )


def test_a_look_names_every_place() -> None:
    scene = Scene(
        (Thing("star", "red", "small", 0.2, 0.2), Thing("circle", "pink", "large", 0.8, 0.5))
    )
    text = corpus.look(scene)
    assert text.startswith("A wood table with 2 objects. top left: small red star; top: nothing; ")
    assert "; right: large pink circle; " in text
    assert text.count("nothing") == 7


def test_image_tokens_are_told_what_they_show() -> None:
    """The head's labels: a thing counts in every cell that covers enough of it."""
    scene = Scene(
        (Thing("star", "red", "small", 0.125, 0.125), Thing("circle", "pink", "large", 0.5, 0.7))
    )
    labels = cell_labels([scene], side=4)
    assert labels[:, 0].tolist() == list(range(16))
    star = [1, 1 + list(COLOURS).index("red"), 1 + SHAPES.index("star"), 1]
    assert labels[0, 1:].tolist() == star
    assert labels[:, 1].nonzero().flatten().tolist() == [0, 9, 10, 13, 14]


def test_the_grounding_loss_tells_right_from_wrong_scenes() -> None:
    torch.manual_seed(0)
    scenes = [sample_scene(np.random.default_rng(i)) for i in range(6)]
    right, wrong = cell_labels(scenes, side=4), cell_labels(scenes[::-1], side=4)
    grounding, _ = auxiliary_heads(64, side=4)
    states = torch.randn(6 * 16, 64)
    optimizer = torch.optim.Adam([*grounding.parameters(), states.requires_grad_(True)], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        grounding.loss(states, right).backward()
        optimizer.step()
    assert grounding.loss(states, right) < 0.05
    assert grounding.loss(states, wrong) > 1


@pytest.fixture(scope="module")
def batches(config: TinyBuildConfig) -> _Batches:
    part = config.understanding.model_copy(
        update={"tokenizer_texts": 50, "batch_size": 4, "binding_weight": 1.0}
    )
    small = config.model_copy(update={"understanding": part})
    section = load_config(ModelConfig, ROOT / "configs" / "tiny.yaml").understanding
    return _Batches(new_understanding(small, section), small, part, "understanding")


def test_mentions_are_at_the_tokens_that_end_them(batches: _Batches) -> None:
    tokenizer = batches.tokenizer
    text = "A wood table. small red star, top left; large pink circle, right. the red star is left"
    ids = tokenizer(text, add_special_tokens=False).input_ids
    said = [
        (tokenizer.decode(ids[: mention.token + 1]).rpartition(" ")[2], mention.words)
        for mention in mentions(text, tokenizer)
    ]
    star, circle = (1 + SHAPES.index(shape) for shape in ("star", "circle"))
    red, pink = (1 + list(COLOURS).index(colour) for colour in ("red", "pink"))
    assert said == [
        ("star", [1, red, star, 0]),
        ("left", [1, red, star, 1]),
        ("circle", [2, pink, circle, 0]),
        ("right", [2, pink, circle, 6]),
    ]


def test_mentions_are_counted_from_the_start_of_the_prompt(batches: _Batches) -> None:
    scene = Scene((Thing("star", "red", "small", 0.2, 0.2),))
    text = Conversation(scene, "small red star, top left", None)
    row = batches._row(text)
    assert [row.ids[m.token] for m in row.mentions] == [
        row.ids[len(row.ids) - 1 - back] for back in (1 + len(_tokens(batches, ", top left")), 1)
    ]
    batch = batches.make([row])
    assert batch.rows.tolist() == [0, 0]
    assert batch.words[1].tolist() == [1, 1, 1 + SHAPES.index("star"), 1]


def _tokens(batches: _Batches, text: str) -> list[int]:
    return list(batches.tokenizer(text, add_special_tokens=False).input_ids)


def test_a_batch_labels_answers_and_pads_the_rest(batches: _Batches) -> None:
    pool = batches.pool(0)
    lengths = [[len(row.ids) for row in rows] for rows in pool]
    assert [len(rows) for rows in pool] == [4] * len(pool)
    ordered = sorted(lengths)
    assert all(max(a) <= min(b) for a, b in itertools.pairwise(ordered))
    for rows in pool:
        inputs, labels, cells, *_ = batches.make(rows)
        assert labels.shape == inputs["input_ids"].shape
        image = inputs["mm_token_type_ids"] == IMAGE_TYPE
        shown = sum(row.scene is not None for row in rows)
        assert int(image.sum()) == 16 * shown == len(cells)
        for i, row in enumerate(rows):
            learnt = labels[i] != -100
            assert labels[i, row.start : len(row.ids)][learnt[row.start : len(row.ids)]].numel() > 0
            assert not learnt[: row.start].any() and not learnt[len(row.ids) :].any()
            assert not (learnt & image[i]).any()
