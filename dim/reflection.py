"""Reflection: the designer looks at what was painted, and has it painted again until it is content.

Round by round the painter paints some candidates, each from its own noise, and the designer reviews
them (``dim.review``). It ends with the round in which one is accepted, with the last round, or
where no review could be had; the best image of all rounds is the answer. One round of one candidate
asks for no review: it is an edit as any other.

:class:`Reflection` decides and does nothing itself, so that a server may paint and ask as it likes;
:func:`reflect` is the whole loop for one edit in this process.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from PIL import Image

from dim.design import Reply, ReviewRequest, Reviews
from dim.errors import BlueprintError, CallsStopped, DesignerError, InputError
from dim.images import encode_png
from dim.review import BEST, Review, parse

MOST_ROUNDS = 4
MOST_CANDIDATES = 10
MAX_SEED = 2**63 - 1

T = TypeVar("T")


@dataclass(frozen=True)
class Wanted:
    """An image to paint: from ``plan``, a blueprint or the instruction itself, with ``seed``."""

    plan: str
    seed: int


@dataclass(frozen=True)
class Candidate(Generic[T]):
    """What was painted in a round, counted from 1, and what was thought of it.

    ``review`` is ``None`` where none was asked for or could be had; ``error`` says why of the
    latter.
    """

    round: int
    wanted: Wanted
    image: T
    review: Review | None
    error: str | None

    def __str__(self) -> str:
        """What was thought of it, in a line."""
        if self.review is None:
            return f"no review: {self.error}" if self.error else "not reviewed"
        verdict = "accepted" if self.review.accepted else "to be painted again"
        said = ": ".join(part for part in (verdict, self.review.missing) if part)
        return f"{self.review.score:.1f} of {BEST}, {said}"

    @property
    def rank(self) -> tuple[bool, float]:
        """Higher is better: accepted before others, then by score; without a review last."""
        if self.review is None:
            return False, -1.0
        return self.review.accepted, self.review.score


class Reflection(Generic[T]):
    """What is to be painted next of one edit, and which image is its answer.

    While :attr:`wanted` names images, paint them and hand them to :meth:`take`, with the replies
    of a reviewer if :attr:`reviewed`.

    Args:
        instruction: the user's wish.
        plan: what the first round paints from.
        seed: of the first image; the others count up from it.
        rounds: at most; 1 to ``MOST_ROUNDS``.
        candidates: images a round; 1 to ``MOST_CANDIDATES``.

    Raises:
        InputError: a number is out of its range.
    """

    def __init__(
        self, instruction: str, plan: str, seed: int, *, rounds: int = 1, candidates: int = 1
    ) -> None:
        for name, number, most in (
            ("rounds", rounds, MOST_ROUNDS),
            ("candidates", candidates, MOST_CANDIDATES),
        ):
            if not 1 <= number <= most:
                raise InputError(f"{name} must be 1 to {most}, not {number}")
        self.instruction = instruction
        self.reviewed = rounds > 1 or candidates > 1
        self._plan, self._seed = plan, seed
        self._rounds, self._candidates = rounds, candidates
        self._painted: list[Candidate[T]] = []
        self._ended = False

    @property
    def wanted(self) -> tuple[Wanted, ...]:
        """The images of the next round; none when the answer is there."""
        if self._ended:
            return ()
        first = self._seed + len(self._painted)
        return tuple(
            Wanted(self._plan, (first + place) % (MAX_SEED + 1))
            for place in range(self._candidates)
        )

    @property
    def candidates(self) -> tuple[Candidate[T], ...]:
        """All that was painted, in order."""
        return tuple(self._painted)

    @property
    def best(self) -> Candidate[T]:
        """The answer: the best of all, the earliest of equals."""
        return max(self._painted, key=lambda candidate: candidate.rank)

    def take(self, images: Sequence[T], replies: Sequence[Reply] | None = None) -> None:
        """The images of :attr:`wanted`, and what a reviewer answered about each."""
        number = 1 + len(self._painted) // self._candidates
        answers = [None] * len(images) if replies is None else replies
        taken = [
            Candidate(number, wanted, image, *_read(reply, self.instruction))
            for wanted, image, reply in zip(self.wanted, images, answers, strict=True)
        ]
        self._painted.extend(taken)
        leading = max(taken, key=lambda candidate: candidate.rank)
        if leading.review is None or leading.review.accepted or number == self._rounds:
            self._ended = True
        elif leading.review.blueprint is not None:
            self._plan = leading.review.blueprint


def reflect(
    paint: Callable[[Sequence[Wanted]], Sequence[Image.Image]],
    reviewer: object,
    source: Image.Image,
    reflection: Reflection[Image.Image],
) -> Candidate[Image.Image]:
    """Paint and review until there is an answer.

    Args:
        paint: one image for each that is wanted.
        reviewer: a designer; it has to review (see :func:`require_reviews`) where it is asked to.
        source: what is edited.
        reflection: of this edit, from its beginning.

    Raises:
        InputError: ``reviewer`` does not review.
    """
    while wanted := reflection.wanted:
        images = paint(wanted)
        if not reflection.reviewed:
            reflection.take(images)
            continue
        image = encode_png(source)
        requests = [
            ReviewRequest(reflection.instruction, each.plan, image, encode_png(painted))
            for each, painted in zip(wanted, images, strict=True)
        ]
        reflection.take(images, _ask(require_reviews(reviewer), requests))
    return reflection.best


def require_reviews(designer: object) -> Reviews:
    """``designer`` as one that reviews.

    Raises:
        InputError: it does not.
    """
    if isinstance(designer, Reviews):
        return designer
    name = getattr(designer, "name", None) or designer or "none"
    raise InputError(
        f"the designer {name} cannot look at what was painted: more than one round or candidate "
        "needs one that can, such as openai:MODEL@URL"
    )


def _ask(reviewer: Reviews, requests: Sequence[ReviewRequest]) -> Sequence[Reply]:
    """The replies; what is painted is not lost because nobody looks at it."""
    try:
        return reviewer.review(requests)
    except CallsStopped as error:
        return [error] * len(requests)


def _read(reply: Reply | None, instruction: str) -> tuple[Review | None, str | None]:
    if reply is None:
        return None, None
    if isinstance(reply, DesignerError):
        return None, str(reply)
    try:
        return parse(reply, instruction=instruction), None
    except BlueprintError as error:
        return None, f"the review cannot be read: {error}"
