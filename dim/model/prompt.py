"""The chat format: what a user says becomes tokens, and which of them are the user's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from dim.errors import InputError

IMAGE_PAD = "<|image_pad|>"
SENTINEL = "\u2402TEXT\u2403"


@dataclass(frozen=True)
class Prompt:
    """A conversation as tokens: ``ids``; those from ``start`` to ``end`` are the user's content.

    Of these the ones from ``text`` on are words, those before it an image.
    """

    ids: list[int]
    start: int
    text: int
    end: int


class ChatFormat:
    """One user turn in the tokenizer's chat template, image first and text last.

    The template is printed around a sentinel and only its fixed parts are read for special tokens:
    a ``<|im_end|>`` that a user types is text, and ends nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.image_token = int(tokenizer.convert_tokens_to_ids(IMAGE_PAD))

    def prompt(self, text: str, image_tokens: int = 0) -> Prompt:
        """The turn up to the end of its content; ``image_tokens`` 0 = no image.

        What follows the content is left out: a causal model's states cannot depend on it.

        Raises:
            InputError: the text is empty.
        """
        if not isinstance(text, str) or not text.strip():
            raise InputError("the prompt is empty")
        before, _ = self._frame_with_image if image_tokens else self._frame
        ids: list[int] = []
        for token in before:
            ids += [token] * image_tokens if token == self.image_token else [token]
        words = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return Prompt(
            ids + words, start=len(self._frame[0]), text=len(ids), end=len(ids) + len(words)
        )

    def request(self, text: str, image_tokens: int = 0) -> Prompt:
        """The whole turn and the opening of the assistant's, for the model to go on."""
        prompt = self.prompt(text, image_tokens)
        _, after = self._frame_with_image if image_tokens else self._frame
        return replace(prompt, ids=prompt.ids + after)

    def frames(self) -> list[bytes]:
        """What stands around a text, without and with an image: the template as tokens."""
        return [repr(frame).encode() for frame in (self._frame, self._frame_with_image)]

    @cached_property
    def _frame(self) -> tuple[list[int], list[int]]:
        return self._around([{"type": "text", "text": SENTINEL}])

    @cached_property
    def _frame_with_image(self) -> tuple[list[int], list[int]]:
        return self._around([{"type": "image"}, {"type": "text", "text": SENTINEL}])

    def _around(self, content: list[dict[str, str]]) -> tuple[list[int], list[int]]:
        printed = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        before, after = printed.split(SENTINEL)
        return (
            self.tokenizer(before, add_special_tokens=False).input_ids,
            self.tokenizer(after, add_special_tokens=False).input_ids,
        )
