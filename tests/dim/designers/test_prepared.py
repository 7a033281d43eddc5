from __future__ import annotations

from typing import Any

from PIL import Image

from dim.designers import CallOptions, DesignRequest, Question
from dim.designers.prepared import PreparedModel
from dim.errors import DesignerError
from tests.pipelines.samples import encoded, photo


def model(known: dict[str, str], **options: Any) -> PreparedModel:
    return PreparedModel("m", CallOptions(**options), known.get)


def test_what_is_not_answered_is_an_error_and_a_question() -> None:
    known: dict[str, str] = {}
    prepared = model(known)
    (reply,) = prepared.design([DesignRequest("Add a hat", b"source", b"target")])
    assert isinstance(reply, DesignerError) and "has not answered this yet" in str(reply)
    ((key, question),) = prepared.take_open().items()
    assert question.images == (b"source", b"target") and "Add a hat" in question.text
    assert prepared.take_open() == {}
    known[key] = "a plan"
    arrived: dict[int, Any] = {}
    request = DesignRequest("Add a hat", b"source", b"target")
    assert prepared.design([request], on_answer=arrived.__setitem__) == ["a plan"]
    assert arrived == {0: "a plan"} and prepared.take_open() == {}
    (unknown,) = prepared.caption([b"source"])
    assert isinstance(unknown, DesignerError)


def test_everything_that_changes_an_answer_changes_its_key() -> None:
    base = Question("text", (b"a", b"b"), {"type": "object"})
    others = [
        Question("other", (b"a", b"b"), {"type": "object"}),
        Question("text", (b"b", b"a"), {"type": "object"}),
        Question("text", (b"a", b"b"), None),
    ]
    keys = {model({}).key(question) for question in [base, *others]}
    keys.add(model({}, temperature=1.0).key(base))
    keys.add(model({}, max_tokens=5).key(base))
    keys.add(PreparedModel("n", CallOptions(), {}.get).key(base))
    assert len(keys) == 7 and model({}).key(base) in keys


def test_an_image_is_known_by_what_is_made_of_it_to_be_shown() -> None:
    image = encoded(photo(1, (100, 50)))
    question = Question("text", (image,))

    def key(max_pixels: int | None, asked: Question = question) -> str:
        return model({}, max_pixels=max_pixels).key(asked)

    assert key(None) == key(5000) != key(4999) != key(1000)
    turned = Image.Exif()
    turned[0x0112] = 3
    assert key(None, Question("text", (encoded(photo(1), exif=turned),))) != key(None)
