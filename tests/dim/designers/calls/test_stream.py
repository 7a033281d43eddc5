"""A completion out of the events of a stream, in whatever pieces they arrive."""

from __future__ import annotations

import pytest

from dim.designers.calls.stream import StreamedCompletion
from dim.designers.calls.wire import NotACompletion, ServerSays
from tests.chat_server import event, streamed

TEXTS = ("1. Edit Instruction: ", "remove the cup – ", "now\n", "2. Global Layout: é")


def whole(texts: tuple[str, ...] = TEXTS, **options: object) -> bytes:
    return b"".join(streamed(texts, **options).pieces)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 3, 17, 10_000])
def test_pieces_of_any_size_are_the_same_completion(size: int) -> None:
    data, stream, told = whole(tokens=(7, 9)), StreamedCompletion(), [""]
    for at in range(0, len(data), size):
        stream.feed(data[at : at + size])
        if stream.text != told[-1]:
            told.append(stream.text)
    completion = stream.end()
    assert completion.text == "".join(TEXTS) == told[-1]
    assert (completion.fault, completion.input_tokens, completion.output_tokens) == (None, 7, 9)
    if size < 20:
        assert told[1:] == ["".join(TEXTS[:count]) for count in range(1, len(TEXTS) + 1)]


def ended(data: bytes) -> object:
    stream = StreamedCompletion()
    stream.feed(data)
    return stream.end()


def test_what_a_server_leaves_out_is_missed_and_no_more() -> None:
    assert ended(whole(tokens=None)).output_tokens is None  # type: ignore[attr-defined]
    crlf = whole().replace(b"\n\n", b"\r\n\r\n")
    assert ended(b": a comment\r\n\r\n" + crlf) == ended(whole())
    assert ended(whole().removesuffix(b"data: [DONE]\n\n")) == ended(whole())
    message = event({"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]})
    assert ended(message).text == "hi"  # type: ignore[attr-defined]


def test_reasoning_is_no_text() -> None:
    stream = StreamedCompletion()
    stream.feed(whole(("thinking",), name="reasoning_content", finish_reason=None))
    assert stream.text == ""
    stream.feed(whole(("said",)))
    assert stream.end().text == "said"


def test_an_answer_that_was_cut_off_says_so() -> None:
    completion = ended(whole(finish_reason="length"))
    assert "cut off" in str(completion.fault)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (whole(finish_reason=None), "in the middle of its stream"),
        (b"", "in the middle of its stream"),
        (b"data: {\n\n", "cannot be read"),
        (b"data: [1]\n\n", "no completion"),
        (whole(finish_reason="abort"), "broke the answer off"),
    ],
)
def test_half_a_stream_is_no_completion(data: bytes, said: str) -> None:
    with pytest.raises(NotACompletion, match=said):
        ended(data)


def test_a_stream_without_end_is_stopped() -> None:
    stream = StreamedCompletion()
    with pytest.raises(NotACompletion, match="more than"):
        for _ in range(20):
            stream.feed(b"x" * 2**20)


def test_an_error_in_a_stream_is_one() -> None:
    with pytest.raises(ServerSays, match="no room") as caught:
        ended(whole(finish_reason=None) + event({"error": {"message": "no room", "code": 503}}))
    assert caught.value.status == 503
