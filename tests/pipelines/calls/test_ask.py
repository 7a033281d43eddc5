from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dim.designers import OnAnswer, Reply, create, create_captioner
from dim.designers.calls.chat import Question
from dim.errors import DesignerError, DimError
from infra.storage import open_store
from pipelines.calls.answers import Answers
from pipelines.calls.ask import Asked, answers_questions, ask_until_read
from pipelines.outcome import Rejection


class Model:
    """Answers each question by a function, and remembers what it was asked."""

    def __init__(self, answer: Callable[[str], Reply]) -> None:
        self._answer = answer
        self.asked: list[Question] = []

    def ask(
        self, questions: Sequence[Question], /, *, on_answer: OnAnswer | None = None
    ) -> list[Reply]:
        self.asked += questions
        replies = [self._answer(one.text) for one in questions]
        for place, reply in enumerate(replies):
            if on_answer is not None and isinstance(reply, str):
                on_answer(place, reply)
        return replies


def number(text: str) -> int:
    """Reads an answer that has to be a number below ten."""
    if not text.isdigit():
        raise DimError(f"{text!r} is no number")
    if int(text) >= 10:
        raise Rejection("too.large", "the number is too large", int(text), 10)
    return int(text)


def asked(*texts: str) -> list[Asked[int]]:
    return [Asked(Question(text, (b"i",), {"type": "integer"}), text, number) for text in texts]


def test_a_useless_answer_is_asked_for_again_with_what_was_wrong() -> None:
    model = Model(
        lambda text: "7" if "'no' is no number" in text else "no" if "b?" in text else "3"
    )
    results = ask_until_read(model.ask, asked("a?", "b?", "c?"), None, 2)
    assert results == [3, 7, 3]
    assert [one.text.partition("\n")[0] for one in model.asked] == ["a?", "b?", "c?", "b?"]
    again = model.asked[-1]
    assert (again.images, again.schema) == ((b"i",), {"type": "integer"})


def test_a_number_and_its_limit_are_told() -> None:
    model = Model(lambda text: "2" if "too large (12, and the limit is 10)" in text else "12")
    assert ask_until_read(model.ask, asked("a?"), None, 1) == [2]


@pytest.mark.parametrize("reasks", [0, 1, 3])
def test_it_is_asked_at_most_so_often(reasks: int) -> None:
    model = Model(lambda text: "12")
    (result,) = ask_until_read(model.ask, asked("a?"), None, reasks)
    assert isinstance(result, Rejection) and result.value == 12
    assert len(model.asked) == 1 + reasks


def test_no_answer_is_not_asked_for_again() -> None:
    model = Model(lambda text: DesignerError("HTTP 500"))
    (result,) = ask_until_read(model.ask, asked("a?"), None, 3)
    assert isinstance(result, DesignerError) and len(model.asked) == 1


def test_nothing_asks_nothing() -> None:
    model = Model(lambda text: "1")
    assert ask_until_read(model.ask, asked(), None, 3) == [] == model.asked


def test_a_rerun_goes_on_where_the_answers_end(tmp_path: Path) -> None:
    """Useless answers were paid for too: only what is missing is asked."""
    store = open_store(str(tmp_path))
    first = Model(lambda text: DesignerError("killed") if "before" in text else "no")
    (result,) = ask_until_read(first.ask, asked("a?"), Answers(store, "range"), 2)
    assert isinstance(result, DesignerError) and len(first.asked) == 2
    second = Model(lambda text: "5")
    assert ask_until_read(second.ask, asked("a?"), Answers(store, "range"), 2) == [5]
    assert [one.text for one in second.asked] == [first.asked[1].text]
    third = Model(lambda text: "6")
    assert ask_until_read(third.ask, asked("a?"), Answers(store, "range"), 2) == [5]
    assert third.asked == []


def test_equal_questions_are_one_however_often_they_are_asked() -> None:
    model = Model(lambda text: "4" if "before" in text else "no")
    assert ask_until_read(model.ask, asked("a?", "a?", "a?"), None, 2) == [4, 4, 4]
    assert len(model.asked) == 2


def test_only_models_can_be_asked_anything() -> None:
    assert answers_questions(create("openai:m@http://127.0.0.1:1/v1"))
    assert answers_questions(create_captioner("openai:m@http://127.0.0.1:1/v1"))
    assert not answers_questions(create("oracle")) and not answers_questions(
        create_captioner("oracle")
    )
