"""A model whose answers were all made beforehand, in one go: it looks them up.

An engine that holds a model in GPU memory is at its best with everything that is to be asked in
one heap. So questions are collected first, by letting the work run into what is not answered yet;
once they are answered it runs again, and finds the answers here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from dim.designers import questions
from dim.designers.base import CallOptions, DesignRequest, OnAnswer, Question, Reply
from dim.designers.calls.wire import sent_as
from dim.errors import DesignerError
from dim.records import sha256_hex

Find = Callable[[str], Reply | None]
"""The answer to the question of a key, if there is one."""


class PreparedModel:
    """Designer and captioner.

    Args:
        model: what the answers' makers called it.
        options: the sampling they were made with, and how large images were sent.
        find: looks an answer up.
    """

    costly = False  # the answers are kept where they are looked up

    def __init__(self, model: str, options: CallOptions, find: Find) -> None:
        self.name = f"vllm:{model}"
        self.fingerprint = (
            f"{self.name} temperature={options.temperature} max_tokens={options.max_tokens}"
        )
        self.max_pixels = options.max_pixels
        self._find = find
        self._open: dict[str, Question] = {}

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`."""
        return self.ask([questions.for_blueprint(each) for each in requests], on_answer=on_answer)

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """See :meth:`dim.designers.Captioner.caption`."""
        return self.ask([questions.for_caption(image) for image in images], on_answer=on_answer)

    def ask(self, asked: Sequence[Question], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """The answer to each question; one that is not there is an error, and is remembered."""
        replies: list[Reply] = []
        for place, question in enumerate(asked):
            key = self.key(question)
            reply = self._find(key)
            if reply is None:
                self._open[key] = question
                reply = DesignerError(f"{self.name} has not answered this yet")
            elif on_answer is not None and isinstance(reply, str):
                on_answer(place, reply)
            replies.append(reply)
        return replies

    def take_open(self) -> dict[str, Question]:
        """The questions without an answer since this was called last, by key."""
        taken, self._open = self._open, {}
        return taken

    def key(self, question: Question) -> str:
        """A hash over exactly what changes the answer."""
        images = [sha256_hex(image) + sent_as(image, self.max_pixels) for image in question.images]
        parts = [self.fingerprint, question.text, images, question.schema]
        return sha256_hex(json.dumps(parts, sort_keys=True).encode())
