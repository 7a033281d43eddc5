from __future__ import annotations

import pytest

from dim.caption import DIMENSIONS, find_fault, parse, request_prompt
from dim.errors import DesignerError


def test_the_request_names_all_21_dimensions() -> None:
    assert len(DIMENSIONS) == len(set(DIMENSIONS)) == 21
    assert all(dimension in request_prompt() for dimension in DIMENSIONS)


def test_a_caption_is_one_paragraph_without_reasoning() -> None:
    assert parse("<think>hm</think>\nA dog.\n\nIt  sits.\n") == "A dog. It sits."
    with pytest.raises(DesignerError, match="empty"):
        parse("<think>hm</think>  ")


@pytest.mark.parametrize(
    ("caption", "reason", "value"),
    [
        ("a dog", "caption.too_short", 2),
        ("a dog " * 20, "caption.too_long", 40),
        ("I'm sorry, but I cannot describe this image for you.", "caption.refusal", None),
        ("I can’t help with that.", "caption.refusal", None),
    ],
)
def test_a_fault_has_a_code_and_a_number(caption: str, reason: str, value: float | None) -> None:
    fault = find_fault(caption, min_words=3, max_words=30)
    assert fault is not None
    assert (fault.reason, fault.value) == (reason, value)


def test_a_good_caption_has_no_fault() -> None:
    assert find_fault("I see a dog that can run", min_words=3, max_words=30) is None
