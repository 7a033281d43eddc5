"""Captions: one call to a captioner per image."""

from __future__ import annotations

import pyarrow as pa

from dim import designers, records
from dim.caption import PROMPT_VERSION, find_fault, parse
from dim.config import StrictModel
from dim.designers import CallOptions
from infra.storage import Store
from pipelines.answers import Answers, answer_key
from pipelines.stages.ask import ask_once
from pipelines.stages.outcome import Rejection, Row, kept, to_rows, to_table, work_on

STAGE = "caption"


class CaptionRules(StrictModel):
    """What a caption must be."""

    min_words: int = 15
    max_words: int = 600


class WriteCaptions:
    """Ask a captioner for each image's long caption.

    Args:
        captioner: its spec.
        calls: how it is called, if over HTTP.
        rules: which captions are kept.
        store: the job's output folder, where paid answers are kept.
    """

    def __init__(
        self, captioner: str, calls: CallOptions, rules: CaptionRules, store: Store
    ) -> None:
        self._captioner = designers.create_captioner(captioner, calls=calls)
        self._rules = rules
        self._answers = Answers(store) if self._captioner.costly else None

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered images with outcomes in, T2I records with outcomes out."""
        rows = to_rows(batch)
        waiting = kept(rows)
        images = [row["image"] for row in waiting]
        keys = [
            answer_key(self._captioner.fingerprint, PROMPT_VERSION, row["image_hash"])
            for row in waiting
        ]
        replies = ask_once(self._captioner.caption, images, keys, self._answers)
        for row, reply in zip(waiting, replies, strict=True):
            row["reply"] = reply
        work_on(rows, STAGE, self._read)
        return to_table(rows, records.T2I)

    def _read(self, row: Row) -> Row:
        reply = row.pop("reply")
        if not isinstance(reply, str):
            raise reply
        caption = parse(reply)
        fault = find_fault(
            caption, min_words=self._rules.min_words, max_words=self._rules.max_words
        )
        if fault is not None:
            raise Rejection(fault.reason, fault.detail, fault.value, fault.threshold)
        return {"caption": caption, "captioner": self._captioner.name}
