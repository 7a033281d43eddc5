from __future__ import annotations

import time
from datetime import UTC, datetime
from email.utils import format_datetime, formatdate

import pytest

from dim.retry_after import LONGEST_S, retry_after_s


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 7 "}, 7.0),
        ({"Retry-After": "0"}, 0.0),
        ({"Retry-After": "1.5"}, 1.5),
        ({"Retry-After-Ms": "250", "Retry-After": "1"}, 0.25),
        ({"Retry-After-Ms": "soon", "Retry-After": "1"}, 1.0),
        ({"Retry-After": formatdate(1_000_030, usegmt=True)}, 30.0),
        ({"Retry-After": format_datetime(datetime.fromtimestamp(1_000_005, UTC))}, 5.0),
        ({"Retry-After": "Mon, 12 Jan 1970 15:46:45 +0200"}, 5.0),
        ({"Retry-After": "Monday, 12-Jan-70 13:46:45 GMT"}, 5.0),
        ({"Retry-After": "Mon Jan 12 13:46:45 1970"}, 5.0),
        ({"Retry-After": formatdate(999_000, usegmt=True)}, 0.0),
    ],
)
def test_it_is_read_in_all_its_forms(
    headers: dict[str, str], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after_s(headers, now=1_000_000.0) == seconds
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    "value",
    [
        *("", "soon", "-3", "-0.5", "+3", "nan", "inf", "1e3", "1_000", "0x10", "٣", "3 s", "1,5"),
        *("Mon, 32 Jan 2024 00:00:00 GMT", "Mon, 01 Jan 99999 00:00:00 GMT", "7\n8", "x" * 100_000),
    ],
)
def test_what_is_neither_a_number_nor_a_date_says_nothing(value: str) -> None:
    assert retry_after_s({"Retry-After": value}) is None
    assert retry_after_s({"Retry-After-Ms": value}) is None


@pytest.mark.parametrize("value", ["9" * 12, "9" * 5_000, "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_huge_pause_is_a_number_to_reckon_with(value: str) -> None:
    assert retry_after_s({"Retry-After": value}) == LONGEST_S


def test_a_date_is_compared_with_this_machine_s_clock() -> None:
    soon = formatdate(time.time() + 30, usegmt=True)
    assert 25 < (retry_after_s({"Retry-After": soon}) or 0) <= 30
