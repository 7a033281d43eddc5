"""Blueprint: a designer writes down what each pair's edit is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import pyarrow as pa

from dim import blueprint, records
from dim.blueprint import Answer, parse_answer
from dim.designers import Designer, DesignRequest, Question
from pipelines.calls.answers import Answers
from pipelines.calls.ask import Asked, answers_questions, ask_once, ask_until_read, read_reply
from pipelines.outcome import Row, kept, settle, to_rows, to_table
from pipelines.stages.triage import STAGE, misaligned, pair_images, pair_key


class WriteBlueprints:
    """Ask a designer for each pair's blueprint; drop pairs that it calls misaligned.

    After triage it is asked for the blueprint of the refined instruction, and not at all where the
    answer to the triage holds it: nothing is paid for that is known. Without, one answer holds the
    verdict and the blueprint; without the target there is nothing to judge.

    Args:
        designer: who is asked.
        answers: where answers are kept; ``None`` keeps none.
        with_target: show it the target too.
        reasks: how often it is asked again, told what was wrong, before the pair fails.
    """

    def __init__(
        self,
        designer: Designer,
        answers: Answers | None,
        with_target: bool = True,
        reasks: int = 2,
    ) -> None:
        self._designer, self._answers = designer, answers
        self._with_target, self._reasks = with_target, reasks

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered pairs or ``TRIAGED`` ones with outcomes in, edit records with outcomes out."""
        rows = to_rows(batch)
        settle(rows, STAGE, self._answer(kept(rows)), self._take)
        return to_table(rows, records.EDIT)

    def _answer(self, rows: Sequence[Row]) -> list[Answer | Exception]:
        known = {
            place: read_reply(_reader(row["instruction"]), row["reply"])
            for place, row in enumerate(rows)
            if row.get("reply") is not None
        }
        left = [row for place, row in enumerate(rows) if place not in known]
        fresh = iter(self._ask(left))
        return [known[place] if place in known else next(fresh) for place in range(len(rows))]

    def _ask(self, rows: Sequence[Row]) -> list[Answer | Exception]:
        designer, answers = self._designer, self._answers
        if answers_questions(designer):
            asked = [self._asked(row) for row in rows]
            return ask_until_read(designer.ask, asked, answers, self._reasks)
        requests = [DesignRequest(row["instruction"], *self._images(row)) for row in rows]
        keys = [self._key(row, blueprint.PROMPT_VERSION, row["instruction"]) for row in rows]
        replies = ask_once(designer.design, requests, keys, answers)
        return [
            read_reply(_reader(row["instruction"]), reply)
            for row, reply in zip(rows, replies, strict=True)
        ]

    def _asked(self, row: Row) -> Asked[Answer]:
        alignment = row.get("alignment")
        if alignment is None and self._with_target:
            return self._asked_for_both(row)
        instruction = row.get("refined_instruction") or row["instruction"]
        text = blueprint.plan_prompt(instruction, self._with_target)

        def read(reply: str) -> Answer:
            answer = parse_answer(reply, instruction=instruction)
            if alignment is None or answer.blueprint is None:
                return answer
            return replace(answer, alignment=alignment)

        key = self._key(row, blueprint.PLAN_VERSION, instruction)
        return Asked(Question(text, self._images(row), blueprint.SCHEMA), key, read, row["id"])

    def _asked_for_both(self, row: Row) -> Asked[Answer]:
        text = blueprint.request_prompt(row["instruction"], self._with_target)
        key = self._key(row, blueprint.PROMPT_VERSION, row["instruction"])
        return Asked(Question(text, self._images(row)), key, _reader(row["instruction"]), row["id"])

    def _images(self, row: Row) -> tuple[bytes, ...]:
        return pair_images(row, with_target=self._with_target)

    def _key(self, row: Row, version: str, instruction: str) -> str:
        return pair_key(self._designer, row, version, instruction, with_target=self._with_target)

    def _take(self, row: Row, answer: Answer) -> Row:
        if answer.blueprint is None:
            raise misaligned(self._designer)
        return {
            "instruction": answer.blueprint.instruction,
            "original_instruction": row["instruction"],
            "blueprint": answer.blueprint.render(),
            "answer": answer.words,
            "alignment": answer.alignment,
            "designer": self._designer.name,
        }


def _reader(instruction: str) -> Callable[[str], Answer]:
    return partial(parse_answer, instruction=instruction)
