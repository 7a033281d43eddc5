from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from dim.errors import InputError
from dim.model.tokenizer import SPECIAL_TOKENS, build_tokenizer

TEXTS = [f"remove the {c} circle left of the {c} square" for c in ("red", "blue", "green")] * 9
TURN = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "remove it"}]},
]


def test_the_same_texts_give_the_same_tokenizer_also_after_saving(tmp_path):
    tokenizer = build_tokenizer(TEXTS, 320)
    assert build_tokenizer(iter(TEXTS), 320).get_vocab() == tokenizer.get_vocab()
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert loaded("remove the red square").input_ids == tokenizer("remove the red square").input_ids
    assert loaded.apply_chat_template(TURN, tokenize=False) == tokenizer.apply_chat_template(
        TURN, tokenize=False
    )


def test_any_text_comes_back_and_known_words_are_short():
    tokenizer = build_tokenizer(TEXTS, 400)
    text = "Remove the red circle — Ünï漢字 🎨\n\n2. Layout"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer(" the circle square").input_ids) == 3
    assert len(tokenizer("You are a helpful assistant.").input_ids) <= 6


def test_special_tokens_follow_the_vocabulary_and_are_one_token_each():
    tokenizer = build_tokenizer(TEXTS, 300)
    ids = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS))
    assert ids == list(range(len(tokenizer) - len(SPECIAL_TOKENS), len(tokenizer)))
    assert tokenizer("<|im_end|><|image_pad|>").input_ids == [ids[2], ids[5]]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_the_chat_template_prints_what_qwen_prints():
    tokenizer = build_tokenizer((), 300)
    assert tokenizer.apply_chat_template(TURN, tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>remove it<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n"
    )


def test_a_vocabulary_without_room_for_the_bytes_is_refused():
    with pytest.raises(InputError, match="at least 263"):
        build_tokenizer(TEXTS, 200)
