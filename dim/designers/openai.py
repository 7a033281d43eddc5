"""Designer and captioner over HTTP: any server that speaks OpenAI's chat completions API."""

from __future__ import annotations

from collections.abc import Sequence

from dim.design import ReviewRequest
from dim.designers import questions
from dim.designers.base import (
    SOMEBODY_WAITS,
    CallOptions,
    DesignRequest,
    OnAnswer,
    OnText,
    Question,
    Reply,
)
from dim.designers.calls.chat import ChatEndpoint
from dim.designers.calls.gate import Exchange


class OpenAIModel:
    """Asks a vision-language model for blueprints, for captions, or anything.

    Args:
        model: the server's name of the model.
        url: the server's base address, or ``None`` for OpenAI's.
        options: how calls are made; ``None``: for somebody who waits for the answer.
        exchange: the meter that other processes count their calls by too.
    """

    costly = True

    def __init__(
        self,
        model: str,
        url: str | None = None,
        options: CallOptions | None = None,
        exchange: Exchange | None = None,
    ) -> None:
        options = options or SOMEBODY_WAITS
        self.name = f"openai:{model}"
        self.fingerprint = fingerprint(model, options)
        self.max_pixels = options.max_pixels
        self._endpoint = ChatEndpoint(model, url, options, exchange)

    def design(
        self,
        requests: Sequence[DesignRequest],
        *,
        on_answer: OnAnswer | None = None,
        on_text: OnText | None = None,
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`. All requests are in flight together.

        With ``on_text`` answers are asked for as streams. A server that does not stream answers as
        ever, and nothing is told before the end.
        """
        asked = [questions.for_blueprint(each) for each in requests]
        return self._endpoint.ask(asked, on_answer, on_text)

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """See :meth:`dim.designers.Captioner.caption`."""
        return self.ask([questions.for_caption(image) for image in images], on_answer=on_answer)

    def review(self, requests: Sequence[ReviewRequest]) -> list[Reply]:
        """See :meth:`dim.design.Reviews.review`. All requests are in flight together."""
        return self.ask([questions.for_review(each) for each in requests])

    def ask(self, asked: Sequence[Question], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """One answer or error per question of any kind; see :class:`ChatEndpoint`."""
        return self._endpoint.ask(asked, on_answer)


def fingerprint(model: str, options: CallOptions) -> str:
    """What changes an answer: the model and its sampling; not the server it runs on."""
    return f"openai:{model} temperature={options.temperature} max_tokens={options.max_tokens}"
