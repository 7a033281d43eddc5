"""What a request came to, noted by whoever does a part of it, for the access log."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass

from serving.jobs import Painted
from serving.work import Work


@dataclass
class Account:
    """Of one request. Seconds of designing are of all blueprints; of waiting and painting, of the
    image that took longest."""

    prompt: str = ""
    images: float = 0.0
    megapixel_steps: float = 0.0
    designed_s: float = 0.0
    waited_s: float = 0.0
    painted_s: float = 0.0

    def admit(self, work: Work) -> None:
        """Note what was let in; of a blueprint nothing is painted."""
        self.images += work.images if work.megapixel_steps else 0
        self.megapixel_steps += work.megapixel_steps

    def paint(self, painted: Painted) -> None:
        """Note an image that was painted."""
        self.waited_s = max(self.waited_s, painted.waited_s)
        self.painted_s = max(self.painted_s, painted.painted_s)


_CURRENT: ContextVar[Account | None] = ContextVar("account", default=None)


def begin() -> Account:
    """The account of a request that begins in this context; tasks that it makes share it."""
    account = Account()
    _CURRENT.set(account)
    return account


def current() -> Account:
    """The account of the request that is being worked on; one for nobody outside of any."""
    return _CURRENT.get() or Account()
