"""Triage and blueprint: both in one call to a designer per pair."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from dim import designers, records
from dim.blueprint import PROMPT_VERSION, parse_answer
from dim.designers import CallOptions, DesignRequest, Reply
from infra.storage import Store
from pipelines.answers import Answers, answer_key
from pipelines.stages.ask import ask_once
from pipelines.stages.outcome import Rejection, Row, kept, to_rows, to_table, work_on

STAGE = "blueprint"


class WriteBlueprints:
    """Ask a designer for each pair's blueprint; drop pairs that it calls misaligned.

    Args:
        designer: its spec.
        calls: how it is called, if over HTTP.
        with_target: show it the target too, and have it judge the instruction.
        store: the job's output folder, where paid answers are kept.
    """

    def __init__(self, designer: str, calls: CallOptions, with_target: bool, store: Store) -> None:
        self._designer = designers.create(designer, calls=calls)
        self._with_target = with_target
        self._answers = Answers(store) if self._designer.costly else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered pairs with outcomes in, edit records with outcomes out."""
        rows = to_rows(batch)
        waiting = kept(rows)
        for row, reply in zip(waiting, self._ask(waiting), strict=True):
            row["reply"] = reply
        work_on(rows, STAGE, self._read)
        return to_table(rows, records.EDIT)

    def _ask(self, rows: Sequence[Row]) -> list[Reply]:
        requests = [self._request(row) for row in rows]
        keys = [self._key(row) for row in rows]
        return ask_once(self._designer.design, requests, keys, self._answers)

    def _request(self, row: Row) -> DesignRequest:
        target = row["image_target"] if self._with_target else None
        return DesignRequest(row["instruction"], row["image"], target)

    def _key(self, row: Row) -> str:
        target_hash = row["image_target_hash"] if self._with_target else None
        return answer_key(
            self._designer.fingerprint,
            PROMPT_VERSION,
            row["image_hash"],
            target_hash,
            row["instruction"],
        )

    def _read(self, row: Row) -> Row:
        reply = row.pop("reply")
        if not isinstance(reply, str):
            raise reply
        answer = parse_answer(reply, instruction=row["instruction"])
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
