"""Triage: a model judges each pair's instruction and refines it, before anything is planned."""

from __future__ import annotations

from functools import partial
from typing import Literal

import pyarrow as pa

from dim import records, triage
from dim.blueprint import parse_answer
from dim.designers import Designer, Question
from dim.errors import BlueprintError
from pipelines.calls.answers import Answers, answer_key
from pipelines.calls.ask import Asked, answers_questions, ask_until_read, shown_key
from pipelines.outcome import Rejection, Row, kept, settle, to_rows, to_table

STAGE = "blueprint"  # as outputs have always called both calls to the designer

TriageBy = Literal["own_call", "same_call"]
"""Whether the instruction is judged in a call of its own, before its blueprint is asked for."""

TRIAGED = pa.schema(
    [
        *records.RAW_PAIR,
        pa.field("alignment", pa.string()),
        pa.field("refined_instruction", pa.string()),
        pa.field("reply", pa.string()),
    ]
)
"""A pair on its way from triage to blueprint: the verdict, and what to plan. ``reply`` is the
model's whole answer where it holds the blueprint too; then there is nothing to plan any more."""


class TriageInstructions:
    """Ask a model whether each pair's instruction fits it; drop the pairs that it calls misaligned.

    Designers that are no model to be asked (recordings, the oracle, a model's own understanding)
    judge in the answer that holds the blueprint: their pairs go on as they came.

    Args:
        designer: who is asked.
        answers: where answers are kept; ``None`` keeps none.
        reasks: how often it is asked again, told what was wrong, before the pair fails.
    """

    def __init__(self, designer: Designer, answers: Answers | None, reasks: int = 2) -> None:
        self._designer, self._answers, self._reasks = designer, answers, reasks

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered pairs with outcomes in, ``TRIAGED`` records with outcomes out."""
        if not answers_questions(self._designer):
            return batch
        rows = to_rows(batch)
        asked = [self._asked(row) for row in kept(rows)]
        results = ask_until_read(self._designer.ask, asked, self._answers, self._reasks)
        settle(rows, STAGE, results, self._take)
        return to_table(rows, TRIAGED)

    def _asked(self, row: Row) -> Asked[Row]:
        text = triage.request_prompt(row["instruction"])
        key = pair_key(self._designer, row, triage.PROMPT_VERSION, row["instruction"])
        read = partial(_read, instruction=row["instruction"])
        return Asked(Question(text, pair_images(row), triage.SCHEMA), key, read, row["id"])

    def _take(self, row: Row, verdict: Row) -> Row:
        if verdict["alignment"] == "misaligned":
            raise misaligned(self._designer)
        return verdict


def pair_images(row: Row, *, with_target: bool = True) -> tuple[bytes, ...]:
    """The encoded images of a pair that a designer is shown."""
    return (row["image"], row["image_target"]) if with_target else (row["image"],)


def pair_key(
    designer: Designer, row: Row, version: str, instruction: str, *, with_target: bool = True
) -> str:
    """The key of an answer about a pair.

    Args:
        designer: who answers.
        row: the pair.
        version: of the prompt.
        instruction: the one that is asked about.
        with_target: whether the target is shown.
    """
    shown = shown_key(designer, row, "image")
    target = shown_key(designer, row, "image_target") if with_target else None
    return answer_key(designer.fingerprint, version, shown, target, instruction)


def misaligned(designer: Designer) -> Rejection:
    """What drops a pair whose instruction does not say what differs."""
    detail = f"{designer.name} finds that the instruction does not fit the pair"
    return Rejection("triage.misaligned", detail)


def _read(reply: str, instruction: str) -> Row:
    """The verdict in a reply; of one that holds the blueprint too, the reply itself."""
    try:
        alignment = parse_answer(reply, instruction=instruction).alignment
    except BlueprintError as error:
        no_plan = error
    else:
        return {"alignment": alignment, "reply": reply}
    try:
        verdict = triage.parse(reply)
    except BlueprintError as error:
        raise BlueprintError(f"{error}; and as a blueprint: {no_plan}") from None
    return {"alignment": verdict.alignment, "refined_instruction": verdict.instruction}
