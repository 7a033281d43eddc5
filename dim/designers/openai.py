"""Designer and captioner over HTTP: any server that speaks OpenAI's chat completions API."""

from __future__ import annotations

from collections.abc import Sequence

from dim import blueprint, caption
from dim.designers.base import (
    SOMEBODY_WAITS,
    CallOptions,
    DesignRequest,
    OnAnswer,
    Question,
    Reply,
)
from dim.designers.calls.chat import ChatEndpoint
from dim.designers.calls.gate import Exchange


class OpenAIDesigner:
    """Asks a vision-language model for blueprints.

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
        self._endpoint = ChatEndpoint(model, url, options, exchange)

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """See :meth:`dim.designers.Designer.design`. All requests are in flight together."""
        return self._endpoint.ask([_question(request) for request in requests], on_answer)

    def ask(
        self, questions: Sequence[Question], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """One answer or error per question of any kind; see :class:`ChatEndpoint`."""
        return self._endpoint.ask(questions, on_answer)


class OpenAICaptioner:
    """Asks a vision-language model for long captions; arguments as of :class:`OpenAIDesigner`."""

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
        self._endpoint = ChatEndpoint(model, url, options, exchange)

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """See :meth:`dim.designers.Captioner.caption`."""
        prompt = caption.request_prompt()
        return self.ask([Question(prompt, (image,)) for image in images], on_answer=on_answer)

    def ask(
        self, questions: Sequence[Question], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """One answer or error per question of any kind; see :class:`ChatEndpoint`."""
        return self._endpoint.ask(questions, on_answer)


def fingerprint(model: str, options: CallOptions) -> str:
    """What changes an answer: the model and its sampling; not the server it runs on."""
    return f"openai:{model} temperature={options.temperature} max_tokens={options.max_tokens}"


def _question(request: DesignRequest) -> Question:
    has_target = request.target is not None
    images = (request.image, request.target) if request.target is not None else (request.image,)
    return Question(blueprint.request_prompt(request.instruction, has_target), images)
