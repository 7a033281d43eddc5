"""A small byte-level BPE tokenizer with Qwen2.5-VL's special tokens and chat format."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import Qwen2Tokenizer
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.errors import InputError

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
BYTES = 256
SYSTEM_PROMPT = "You are a helpful assistant."

# What Qwen2.5-VL's template prints, written anew: a default system turn when the conversation has
# none, pictures as a one-token placeholder between vision marks, and an open assistant turn last.
CHAT_TEMPLATE = (
    "{%- set marks = {'image': '<|image_pad|>', 'video': '<|video_pad|>'} -%}"
    "{%- if messages and messages[0].role != 'system' -%}"
    "{{ '<|im_start|>system\\n" + SYSTEM_PROMPT + "<|im_end|>\\n' }}"
    "{%- endif -%}"
    "{%- for turn in messages -%}"
    "{{ '<|im_start|>' + turn.role + '\\n' }}"
    "{%- if turn.content is string -%}{{ turn.content }}"
    "{%- else -%}"
    "{%- for part in turn.content -%}"
    "{%- if part.type in marks -%}"
    "{{ '<|vision_start|>' + marks[part.type] + '<|vision_end|>' }}"
    "{%- elif part.type == 'text' -%}{{ part.text }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|im_end|>\\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """Learn a byte-level BPE vocabulary of at most ``vocab_size`` tokens from ``texts``.

    The ids are: 256 bytes, then merges, then the special tokens of Qwen2.5-VL, as in the original.
    Without texts the tokenizer is a plain byte tokenizer. The same texts in the same order give
    the same tokenizer; ``save_pretrained`` and ``AutoTokenizer.from_pretrained`` keep it.

    Raises:
        InputError: ``vocab_size`` leaves no room for the bytes and the special tokens.
    """
    smallest = BYTES + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise InputError(f"a tokenizer needs at least {smallest} tokens, not {vocab_size}")
    vocabulary, merges = _learn(texts, vocab_size - len(SPECIAL_TOKENS))
    return Qwen2Tokenizer(
        vocab=vocabulary | {token: len(vocabulary) + i for i, token in enumerate(SPECIAL_TOKENS)},
        merges=merges,
        unk_token="<|endoftext|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
        chat_template=CHAT_TEMPLATE,
    )


def _learn(texts: Iterable[str], size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair merges learnt with the pre-tokenization that the tokenizer will use."""
    blank = Qwen2Tokenizer().backend_tokenizer
    learner = Tokenizer(models.BPE())
    learner.normalizer = normalizers.NFC()
    learner.pre_tokenizer = blank.pre_tokenizer
    learner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(_in_frame(texts), trainer)
    return learner.get_vocab(), _merges(learner)


def _in_frame(texts: Iterable[str]) -> Iterator[str]:
    """Every text is seen inside a conversation, so the words of the frame count as often."""
    for text in texts:
        yield from ("system\n", SYSTEM_PROMPT, "user\n", text, "assistant\n")


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) for pair in merges]
