"""Triage and blueprint each by itself: what one leaves for the other, and what neither asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dim import blueprint, records, triage
from dim.blueprint import Blueprint
from dim.designers import CallOptions, DesignRequest, OnAnswer, Question, Reply
from dim.errors import DesignerError
from infra.storage import open_store
from pipelines.calls.answers import Answers, answer_key
from pipelines.calls.worker import AskingWorker, AskInTurn, CalledModel
from pipelines.outcome import travelling
from pipelines.stages.blueprint import WriteBlueprints
from pipelines.stages.triage import TRIAGED, TriageInstructions
from tests.pipelines.stages.test_blueprint_stage import raw_pairs

PLAN = Blueprint("Add a red box on the left.", "A field.", "- grass", "The left.", "A box.")
WHOLE = f"Alignment: partially aligned\n\n{PLAN.render()}"
BETWEEN = {"refined_instruction", "reply"}
"""The columns that only go from triage to blueprint."""


def verdict(alignment: str, instruction: str = "Add a small red box.") -> str:
    return f"Differences: a box.\nAlignment: {alignment}\nInstruction: {instruction}"


class Model:
    """A model that can be asked anything, and answers by a function of the question's text."""

    name, fingerprint, costly = "openai:m", "openai:m t=0", True

    def __init__(self, answer: Callable[[str], Reply]) -> None:
        self._answer = answer
        self.asked: list[Question] = []

    def ask(
        self, questions: Sequence[Question], /, *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        self.asked += questions
        replies = [self._answer(question.text) for question in questions]
        for place, reply in enumerate(replies):
            if on_answer is not None and isinstance(reply, str):
                on_answer(place, reply)
        return replies

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        raise AssertionError("a model is asked, and not given the whole task")


class Recording:
    """A designer that does its one task only."""

    name, fingerprint, costly = "recording", "recording", False

    def design(
        self, requests: Sequence[DesignRequest], *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        return [WHOLE for _ in requests]


def nobody(text: str) -> Reply:
    raise AssertionError(f"nothing is to be asked, but {text!r} was")


def triaged(batch: pa.Table, **columns: Sequence[str | None]) -> pa.Table:
    """Pairs as triage would leave them."""
    names = [name for name in TRIAGED.names if name not in batch.schema.names]
    for name in names:
        batch = batch.append_column(name, pa.array(columns.get(name, [None] * len(batch)), "str"))
    return batch


@pytest.fixture
def pairs(tmp_path: Path) -> Callable[[int], pa.Table]:
    return lambda count: raw_pairs(tmp_path, count)


def test_triage_leaves_a_verdict_and_what_to_plan(pairs: Callable[[int], pa.Table]) -> None:
    answers = {
        "number 0.": verdict("aligned"),
        "number 1.": verdict("misaligned", "-"),
        "number 2.": WHOLE,
        "number 3.": DesignerError("HTTP 500"),
    }
    model = Model(lambda text: next(a for key, a in answers.items() if key in text))
    made = TriageInstructions(model, None)(pairs(4))
    assert made.schema == travelling(TRIAGED)
    judged, wrong, planned, unanswered = made.to_pylist()
    assert (judged["outcome"], judged["alignment"]) == ("kept", "aligned")
    assert judged["refined_instruction"] == "Add a small red box." and judged["reply"] is None
    assert judged["instruction"] == "Add red box number 0."  # the refined one is only proposed
    assert (wrong["outcome"], wrong["reason"]) == ("rejected", "triage.misaligned")
    assert wrong["image"] is None and wrong["alignment"] is None
    assert (planned["alignment"], planned["reply"]) == ("partially aligned", WHOLE)
    assert (unanswered["outcome"], unanswered["stage"]) == ("failed", "blueprint")
    assert unanswered["error"] == "HTTP 500"
    assert [len(question.images) for question in model.asked] == [2] * 4
    assert all(question.schema == triage.SCHEMA for question in model.asked)


def test_triage_asks_again_so_often_and_no_more(pairs: Callable[[int], pa.Table]) -> None:
    model = Model(lambda text: "I would say it fits.")
    (row,) = TriageInstructions(model, None, reasks=1)(pairs(1)).to_pylist()
    assert len(model.asked) == 2 and "no line 'Alignment" in model.asked[1].text
    assert (row["outcome"], row["stage"]) == ("failed", "blueprint")


def test_triage_passes_on_what_is_out_already(pairs: Callable[[int], pa.Table]) -> None:
    batch = pairs(2).append_column("outcome", pa.array(["failed", "kept"]))
    model = Model(lambda text: verdict("aligned"))
    out, kept = TriageInstructions(model, None)(batch).to_pylist()
    assert len(model.asked) == 1
    assert (out["outcome"], kept["outcome"]) == ("failed", "kept")


def test_a_designer_that_judges_when_it_plans_has_no_triage(
    pairs: Callable[[int], pa.Table],
) -> None:
    batch = pairs(2)
    designer: Any = Recording()
    assert TriageInstructions(designer, None)(batch) is batch
    rows = WriteBlueprints(designer, None)(batch).to_pylist()
    assert [row["alignment"] for row in rows] == ["partially aligned"] * 2
    assert [row["blueprint"] for row in rows] == [PLAN.render()] * 2


def test_the_refined_instruction_is_planned_and_the_verdict_kept(
    pairs: Callable[[int], pa.Table],
) -> None:
    model = Model(lambda text: PLAN.render())
    columns = {"alignment": ["partially aligned"], "refined_instruction": ["Add a green box."]}
    made = WriteBlueprints(model, None)(triaged(pairs(1), **columns))
    assert made.schema == travelling(records.EDIT)
    assert not BETWEEN & set(made.schema.names)
    (row,) = made.to_pylist()
    (question,) = model.asked
    assert question.text == blueprint.plan_prompt("Add a green box.", True)
    assert question.schema == blueprint.SCHEMA
    assert (row["outcome"], row["alignment"]) == ("kept", "partially aligned")
    assert row["original_instruction"] == "Add red box number 0."


def test_an_answer_to_the_triage_that_holds_the_plan_is_read_and_not_asked_for(
    pairs: Callable[[int], pa.Table],
) -> None:
    columns = {"alignment": ["partially aligned"], "reply": [WHOLE]}
    (row,) = WriteBlueprints(Model(nobody), None)(triaged(pairs(1), **columns)).to_pylist()
    assert (row["outcome"], row["blueprint"]) == ("kept", PLAN.render())
    assert (row["alignment"], row["designer"]) == ("partially aligned", "openai:m")


def test_pairs_that_are_planned_already_stand_among_others(
    pairs: Callable[[int], pa.Table],
) -> None:
    """Each answer comes to its own pair, also where only some are asked about."""
    model = Model(lambda text: PLAN.render().replace("A field.", text[text.index("number") :][:8]))
    batch = triaged(
        pairs(4),
        alignment=["aligned"] * 4,
        refined_instruction=["number 0", None, "number 2", "number 3"],
        reply=[None, WHOLE, None, None],
    ).append_column("outcome", pa.array(["kept", "kept", "rejected", "kept"]))
    rows = WriteBlueprints(model, None)(batch).to_pylist()
    assert len(model.asked) == 2 and [row["outcome"] for row in rows].count("kept") == 3
    assert ["number 0" in rows[0]["blueprint"], "number 3" in rows[3]["blueprint"]] == [True] * 2
    assert rows[1]["blueprint"] == PLAN.render() and rows[2]["blueprint"] is None


def test_a_pair_nobody_judged_is_judged_in_the_one_answer(
    pairs: Callable[[int], pa.Table],
) -> None:
    model = Model(lambda text: WHOLE if "number 0." in text else "Alignment: misaligned")
    kept, out = WriteBlueprints(model, None)(pairs(2)).to_pylist()
    assert [question.text for question in model.asked] == [
        blueprint.request_prompt(f"Add red box number {n}.", True) for n in range(2)
    ]
    assert (kept["alignment"], out["reason"]) == ("partially aligned", "triage.misaligned")


def test_a_plan_that_never_comes_fails_in_the_blueprint(pairs: Callable[[int], pa.Table]) -> None:
    model = Model(lambda text: verdict("aligned") if "three lines" in text else "I'm sorry, no.")
    steps = (TriageInstructions, WriteBlueprints)
    (row,) = AskInTurn(steps, model, None)(pairs(1)).to_pylist()
    assert (row["outcome"], row["stage"]) == ("failed", "blueprint")
    assert len(model.asked) == 1 + 3


def test_answers_go_on_counting_under_the_keys_they_have(
    pairs: Callable[[int], pa.Table], tmp_path: Path
) -> None:
    """What was paid for by an earlier version is found: who answers, prompt, images, words."""
    batch = pairs(1)
    (row,) = batch.to_pylist()
    answers = Answers(open_store(str(tmp_path / "out")), "range")
    images = (row["image_hash"], row["image_target_hash"])
    words = row["instruction"]
    asked = {
        (triage.PROMPT_VERSION, *images, words): verdict("aligned"),
        (blueprint.PLAN_VERSION, *images, "Add a small red box."): PLAN.render(),
        (blueprint.PROMPT_VERSION, *images, words): WHOLE,
        (blueprint.PLAN_VERSION, images[0], None, words): PLAN.render(),
    }
    for parts, reply in asked.items():
        answers.add(answer_key("openai:m t=0", *parts), reply)
    model = Model(nobody)
    in_turn = AskInTurn((TriageInstructions, WriteBlueprints), model, answers)
    same_call = WriteBlueprints(model, answers)
    no_target = WriteBlueprints(model, answers, with_target=False)
    for way, said in ((in_turn, "aligned"), (same_call, "partially aligned"), (no_target, None)):
        (made,) = way(batch).to_pylist()
        assert made["outcome"] == "kept" and made["alignment"] == (said or "unstated")


def test_the_steps_of_a_worker_share_one_model_and_a_range_its_answers(
    pairs: Callable[[int], pa.Table], tmp_path: Path
) -> None:
    opened: list[Model] = []

    def create(spec: str, **options: Any) -> Model:
        opened.append(Model(lambda text: verdict("aligned") if "three lines" in text else WHOLE))
        return opened[-1]

    store = open_store(str(tmp_path / "out"))
    called = CalledModel("openai:m", create, CallOptions(), store)
    work = AskingWorker((TriageInstructions, WriteBlueprints), called)
    for name, asked in (("a", 2), ("b", 4), ("a", 4)):
        with work.of_range(name) as ask:
            assert ask(pairs(1))["outcome"].to_pylist() == ["kept"]
        (model,) = opened
        assert len(model.asked) == asked
