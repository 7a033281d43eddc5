"""What every designer and captioner is: many requests in, one answer or error each, in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, model_validator

from dim.config import HowOnly, StrictModel
from dim.design import DesignRequest, Reply
from dim.designers.calls.usage import Prices, Unusable
from dim.errors import DesignerError

RequestT = TypeVar("RequestT")
OnAnswer = Callable[[int, str | Unusable], None]
"""Called with (place of the request, answer) the moment an answer arrives, from any thread.

An answer that was paid for and cannot be used is one too; see
:class:`dim.designers.calls.usage.Unusable`.
"""
OnText = Callable[[int, str], None]
"""Called with (place of the request, its answer so far) while answers are written, from any thread.

Where an answer is asked for again, what is told begins again too.
"""


@dataclass(frozen=True)
class Question:
    """A text with the images it speaks of, encoded.

    ``schema`` is the JSON schema that the answer should keep to, where the server can see to it.
    """

    text: str
    images: tuple[bytes, ...]
    schema: dict[str, Any] | None = None


class Designer(Protocol):
    """Writes blueprints."""

    name: str
    """What the records say wrote them."""

    fingerprint: str
    """Name and everything else about this designer that changes its answers."""

    costly: bool
    """Whether an answer is worth keeping, because it costs money."""

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        """One answer text (see :func:`dim.blueprint.parse_answer`) or error per request.

        A bad request never raises and never touches its neighbours.

        Raises:
            CallsStopped: nothing more can be asked of the model, whatever the request.
        """
        ...


class Captioner(Protocol):
    """Writes long captions; attributes as of :class:`Designer`."""

    name: str
    fingerprint: str
    costly: bool

    def caption(self, images: Sequence[bytes], *, on_answer: OnAnswer | None = None) -> list[Reply]:
        """One caption text or error per encoded image; never raises for one of them."""
        ...


class BreakerOptions(StrictModel):
    """When a model that does not answer is left alone for a while, and when it is given up."""

    failures: int = Field(default=20, ge=1)
    """Failures in a row, whatever the request, after which it counts as down."""
    pause_s: float = Field(default=5.0, gt=0)
    """Until one request is tried; twice as long after each that fails, up to a minute."""
    down_s: float = Field(default=300.0, ge=0)
    """Down for so long, the job stops; nothing that was not asked is lost."""


class CallOptions(StrictModel):
    """How a vision-language model is called over HTTP."""

    in_flight: Annotated[int, HowOnly] = Field(default=64, ge=1)
    """Requests open at once, per worker."""
    timeout_s: Annotated[float, HowOnly] = Field(default=120.0, gt=0)
    """For one attempt, from sending to the last byte."""
    retries: Annotated[int, HowOnly] = Field(default=6, ge=0)
    """Further attempts after 408, 409, 5xx, a broken connection or something that is no
    completion, with growing pauses. Being told to wait (429) costs none of them."""
    busy_s: Annotated[float, HowOnly] = Field(default=600.0, ge=0)
    """How long a request is put off by a server that says it is too busy."""
    max_tokens: int = Field(default=2048, ge=1)
    """Of an answer; one that is cut off there does not count."""
    temperature: float = Field(default=0.0, ge=0)
    """0: the most likely answer, each time."""
    max_pixels: int | None = Field(default=1_605_632, gt=0)
    """Width x height of an image that is sent; a larger one is made smaller for it. ``None``: none
    is. The default is 2,048 tokens of Qwen2.5-VL (28 x 28 pixels each): a pair of images, the
    prompt and the answer fit into a context of 8,192."""
    requests_per_minute: Annotated[float | None, HowOnly] = Field(default=None, gt=0)
    """Of all workers together; ``None``: no limit."""
    tokens_per_minute: Annotated[float | None, HowOnly] = Field(default=None, gt=0)
    """Of requests and answers of all workers together; ``None``: no limit."""
    input_price: Annotated[float, HowOnly] = Field(default=0.0, ge=0)
    """US dollars for a million tokens of requests."""
    output_price: Annotated[float, HowOnly] = Field(default=0.0, ge=0)
    """US dollars for a million tokens of answers."""
    budget: Annotated[float | None, HowOnly] = Field(default=None, gt=0)
    """US dollars at which the job stops, with what earlier runs into the same output paid."""
    hedge_after: Annotated[float | None, HowOnly] = Field(default=None, gt=0, lt=1)
    """Ask a second time when an answer takes longer than this share of the last ones did (0.95:
    longer than 95 % of them), and take the first to come. Both are reckoned to be billed."""
    breaker: Annotated[BreakerOptions, HowOnly] = BreakerOptions()

    @property
    def prices(self) -> Prices:
        """What tokens cost."""
        return Prices(self.input_price, self.output_price)

    @model_validator(mode="after")
    def _check_budget(self) -> CallOptions:
        if self.budget is not None and not (self.input_price or self.output_price):
            raise ValueError("a budget needs input_price or output_price")
        return self


SOMEBODY_WAITS = CallOptions(busy_s=30, breaker=BreakerOptions(down_s=30))
"""For single requests: a job has all night, and a person has not."""


def answer_each(
    requests: Sequence[RequestT],
    answer: Callable[[RequestT], str],
    on_answer: OnAnswer | None = None,
) -> list[Reply]:
    """Answer requests one by one with a function that may raise; an error stays with its own."""
    replies: list[Reply] = []
    for place, request in enumerate(requests):
        try:
            reply: Reply = answer(request)
        except DesignerError as error:
            reply = error
        except Exception as error:  # whatever one record does, its neighbours must get answers
            reply = DesignerError(" ".join(str(error).split()) or type(error).__name__)
        if on_answer is not None and isinstance(reply, str):
            on_answer(place, reply)
        replies.append(reply)
    return replies
