"""Triage and blueprint: two calls to a designer per pair, or one where it answers both at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal

import pyarrow as pa

from dim import blueprint, designers, records, triage
from dim.blueprint import Answer, parse_answer
from dim.designers import CallOptions, DesignRequest
from dim.designers.calls.gate import Exchange
from dim.designers.prepared import PreparedModel
from dim.errors import BlueprintError
from dim.triage import Triage
from infra.storage import Store
from pipelines.calls.answers import Answers, answer_key
from pipelines.calls.ask import ask_once, prepared_or_made, shown_key
from pipelines.calls.reask import Asked, answers_questions, ask_until_read, question, read_reply
from pipelines.outcome import Rejection, Row, kept, to_rows, to_table, work_on

STAGE = "blueprint"

TriageBy = Literal["own_call", "same_call"]
"""Whether the instruction is judged in a call of its own, before its blueprint is asked for."""

Result = Answer | Triage | Exception
"""What came of a question; a :class:`Triage` is one that a blueprint still has to be asked for."""


class WriteBlueprints:
    """Ask a designer for each pair's blueprint; drop pairs that it calls misaligned.

    A designer that is a model is first asked to judge and refine the instruction, and then for the
    blueprint of the refined one. Others (recordings, the oracle, a model's own understanding) do
    both in one answer; so does, by ``triage``, a model. An answer to the first question that holds
    the blueprint too is taken as it is: nothing is paid for that is known.

    Args:
        designer: its spec, or a model whose answers are there.
        calls: how it is called, if over HTTP.
        with_target: show it the target too, and have it judge the instruction.
        store: the job's output folder, where paid answers are kept.
        triage: in how many calls; without target there is nothing to judge, and one call.
        reasks: how often it is asked again, told what was wrong, before the pair fails.
        exchange: the meter of all workers, where calls have a limit.
    """

    def __init__(
        self,
        designer: str | PreparedModel,
        calls: CallOptions,
        with_target: bool,
        store: Store,
        triage: TriageBy = "own_call",
        reasks: int = 2,
        exchange: Exchange | None = None,
    ) -> None:
        create = partial(designers.create, calls=calls, exchange=exchange)
        self._designer = prepared_or_made(designer, create, calls, store)
        self._with_target = with_target
        self._own_call = with_target and triage == "own_call"
        self._max_pixels = calls.max_pixels
        self._reasks = reasks
        self._answers = Answers(store) if self._designer.costly else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered pairs with outcomes in, edit records with outcomes out."""
        rows = to_rows(batch)
        waiting = kept(rows)
        for row, result in zip(waiting, self._ask(waiting), strict=True):
            row["result"] = result
        work_on(rows, STAGE, self._take)
        return to_table(rows, records.EDIT)

    def _ask(self, rows: Sequence[Row]) -> list[Result]:
        designer, answers = self._designer, self._answers
        if not answers_questions(designer):
            requests = [self._request(row) for row in rows]
            keys = [self._key(row, blueprint.PROMPT_VERSION, row["instruction"]) for row in rows]
            replies = ask_once(designer.design, requests, keys, answers)
            pairs = zip(rows, replies, strict=True)
            return [read_reply(_reader(row["instruction"]), reply) for row, reply in pairs]
        first = self._triage if self._own_call else self._both if self._with_target else self._plan
        asked = [first(row) for row in rows]
        results: list[Result] = ask_until_read(designer.ask, asked, answers, self._reasks)
        judged = {n: result for n, result in enumerate(results) if isinstance(result, Triage)}
        asked = [self._plan(rows[place], verdict) for place, verdict in judged.items()]
        plans = ask_until_read(designer.ask, asked, answers, self._reasks)
        planned = dict(zip(judged, plans, strict=True))
        return [planned.get(place, result) for place, result in enumerate(results)]

    def _triage(self, row: Row) -> Asked[Answer | Triage]:
        text = triage.request_prompt(row["instruction"])
        key = self._key(row, triage.PROMPT_VERSION, row["instruction"])
        read = partial(_read_triage, instruction=row["instruction"])
        return Asked(question(text, self._images(row), triage.SCHEMA), key, read, row["id"])

    def _both(self, row: Row) -> Asked[Answer | Triage]:
        text = blueprint.request_prompt(row["instruction"], self._with_target)
        key = self._key(row, blueprint.PROMPT_VERSION, row["instruction"])
        return Asked(question(text, self._images(row)), key, _reader(row["instruction"]), row["id"])

    def _plan(self, row: Row, verdict: Triage | None = None) -> Asked[Answer | Triage]:
        instruction = (verdict and verdict.instruction) or row["instruction"]
        text = blueprint.plan_prompt(instruction, self._with_target)

        def read(reply: str) -> Answer:
            answer = parse_answer(reply, instruction=instruction)
            if verdict is None or answer.blueprint is None:
                return answer
            return replace(answer, alignment=verdict.alignment)

        key = self._key(row, blueprint.PLAN_VERSION, instruction)
        return Asked(question(text, self._images(row), blueprint.SCHEMA), key, read, row["id"])

    def _request(self, row: Row) -> DesignRequest:
        return DesignRequest(row["instruction"], *self._images(row))

    def _images(self, row: Row) -> list[bytes]:
        return [row["image"], row["image_target"]] if self._with_target else [row["image"]]

    def _key(self, row: Row, version: str, instruction: str) -> str:
        names = ("image", "image_target") if self._with_target else ("image",)
        image, target, *_ = (*(shown_key(row, name, self._max_pixels) for name in names), None)
        return answer_key(self._designer.fingerprint, version, image, target, instruction)

    def _take(self, row: Row) -> Row:
        answer = row.pop("result")
        if isinstance(answer, Exception):
            raise answer
        if answer.blueprint is None:
            detail = f"{self._designer.name} finds that the instruction does not fit the pair"
            raise Rejection("triage.misaligned", detail)
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


def _read_triage(reply: str, instruction: str) -> Answer | Triage:
    """The verdict in a reply to the first question, or all there is where it holds the plan too."""
    try:
        return parse_answer(reply, instruction=instruction)
    except BlueprintError as error:
        no_plan = error
    try:
        verdict = triage.parse(reply)
    except BlueprintError as error:
        raise BlueprintError(f"{error}; and as a blueprint: {no_plan}") from None
    misaligned = verdict.alignment == "misaligned"
    return Answer(verdict.alignment, None, None) if misaligned else verdict
