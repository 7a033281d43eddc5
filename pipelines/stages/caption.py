"""Captions: one call to a captioner per image, and another where the answer cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from pydantic import Field, model_validator

from dim import caption as captions
from dim.caption import DIMENSIONS, Caption, Language
from dim.config import StrictModel
from dim.designers import Captioner, Question
from dim.errors import DesignerError
from dim.records import T2I
from pipelines.calls.answers import Answers, answer_key
from pipelines.calls.ask import (
    Asked,
    answers_questions,
    ask_once,
    ask_until_read,
    read_reply,
    shown_key,
)
from pipelines.outcome import Rejection, Row, kept, settle, to_rows, to_table

STAGE = "caption"


class CaptionRules(StrictModel):
    """What a caption must be. See :func:`dim.caption.find_fault` for how each is measured."""

    min_words: int = Field(15, ge=1)
    max_words: int = Field(600, ge=1)
    min_dimensions: int = Field(6, ge=0, le=len(DIMENSIONS))
    """Of the 21 dimensions, where the captioner answered for each."""
    min_dimensions_in_prose: int = Field(3, ge=0, le=len(DIMENSIONS))
    """Where it wrote plain prose, from which they are estimated."""
    language: Language = "en"
    max_repetition: float = Field(0.2, ge=0, le=1)
    """Largest share of words in runs of eight that came before."""
    max_boilerplate: float = Field(0.34, ge=0, le=1)
    """Largest share of sentences such as "The image shows …"."""
    reasks: int = Field(2, ge=0)
    """How often a captioner is asked again, told what was wrong, before the image is rejected."""

    @model_validator(mode="after")
    def _window(self) -> CaptionRules:
        if self.min_words > self.max_words:
            raise ValueError("min_words is larger than max_words")
        return self


class WriteCaptions:
    """Ask a captioner for each image's long caption.

    Args:
        captioner: who is asked.
        answers: where answers are kept; ``None`` keeps none.
        rules: which captions are kept.
    """

    def __init__(self, captioner: Captioner, answers: Answers | None, rules: CaptionRules) -> None:
        self._captioner, self._answers, self._rules = captioner, answers, rules
        self._limits = rules.model_dump(exclude={"reasks"})

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Filtered images with outcomes in, T2I records with outcomes out."""
        rows = to_rows(batch)
        settle(rows, STAGE, self._ask(kept(rows)), self._take)
        return to_table(rows, T2I)

    def _ask(self, rows: Sequence[Row]) -> list[Caption | Exception]:
        captioner, answers = self._captioner, self._answers
        if answers_questions(captioner):
            asked = [self._asked(row) for row in rows]
            return ask_until_read(captioner.ask, asked, answers, self._rules.reasks)
        images = [row["image"] for row in rows]
        replies = ask_once(captioner.caption, images, [self._key(row) for row in rows], answers)
        return [read_reply(self._read, reply) for reply in replies]

    def _asked(self, row: Row) -> Asked[Caption]:
        text = captions.request_prompt(self._rules.language)
        question = Question(text, (row["image"],), captions.SCHEMA)
        return Asked(question, self._key(row), self._read, row["id"])

    def _key(self, row: Row) -> str:
        version = f"{captions.PROMPT_VERSION} {self._rules.language}"
        shown = shown_key(self._captioner, row, "image")
        return answer_key(self._captioner.fingerprint, version, shown)

    def _read(self, reply: str) -> Caption:
        try:
            caption = captions.read(reply)
        except DesignerError as error:
            raise Rejection("caption.unreadable", str(error)) from None
        fault = captions.find_fault(caption, **self._limits)
        if fault is not None:
            raise Rejection(fault.reason, fault.detail, fault.value, fault.threshold)
        return caption

    def _take(self, row: Row, caption: Caption) -> Row:
        return {"caption": caption.text, "captioner": self._captioner.name}
