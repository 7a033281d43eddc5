"""What an answer cost: tokens, money and time, carried by the answer itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from dim.errors import DesignerError

_PER_MILLION = 1e-6


@dataclass(frozen=True)
class Usage:
    """What one answer cost.

    Args:
        input_tokens: of the request with its images, as the server counted them.
        output_tokens: of the answer.
        usd: by the prices of the configuration; 0 where there are none.
        seconds: from sending the request that was answered to the last byte.
    """

    input_tokens: int
    output_tokens: int
    usd: float
    seconds: float


@dataclass(frozen=True)
class Prices:
    """US dollars for a million tokens."""

    input: float = 0.0
    output: float = 0.0

    def of(self, input_tokens: float, output_tokens: float) -> float:
        """US dollars for so many tokens."""
        return (input_tokens * self.input + output_tokens * self.output) * _PER_MILLION


class Answer(str):
    """An answer text that knows what it cost; to everyone else it is a ``str``."""

    usage: Usage

    def __new__(cls, text: str, usage: Usage) -> Answer:
        """Make an answer of ``text``."""
        answer = super().__new__(cls, text)
        answer.usage = usage
        return answer

    def __reduce__(self) -> tuple[type[Answer], tuple[str, Usage]]:
        return Answer, (str(self), self.usage)


class Unusable(DesignerError):
    """An answer that came, and was paid for, and holds nothing: cut off, refused or empty.

    ``final``: the model said something, and would hardly say something else if asked again.
    """

    def __init__(self, message: str, usage: Usage, *, final: bool = True) -> None:
        super().__init__(message)
        self.usage = usage
        self.final = final

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(Unusable, final=self.final), (str(self), self.usage)
