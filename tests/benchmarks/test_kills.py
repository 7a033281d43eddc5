"""What the kill matrix counts, and how its table is put into the page."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

from benchmarks.kills import (
    DOCS,
    DRIVER,
    HEAD,
    ON_S3,
    WATCHED,
    WORKER,
    Cell,
    Designer,
    arm,
    with_rows,
)

GOOD = Cell("edit", "reading", DRIVER, True, 0, 0, 0, 2, 3)


@pytest.mark.parametrize(
    "bad",
    [{"same": False}, {"lost": 1}, {"doubled": 1}, {"paid_again": 1}, {"cut_off": 3},
     {"done_again": 100}],
)  # fmt: skip
def test_a_kill_that_costs_more_than_what_was_under_way_is_not_good(bad: dict[str, int]) -> None:
    assert GOOD.is_good
    assert not dataclasses.replace(GOOD, **bad).is_good


def test_on_an_object_store_answers_of_the_last_second_may_be_asked_again() -> None:
    on_s3 = dataclasses.replace(GOOD, job=f"edit{ON_S3}", cut_off=9)
    assert on_s3.is_good and not dataclasses.replace(on_s3, paid_again=1).is_good


def test_only_an_answer_that_was_there_for_a_second_counts_as_paid_again() -> None:
    asked = [("old", 10.0), ("fresh", 19.5), ("once", 12.0), ("old", 21.0), ("fresh", 22.0)]
    assert Designer("", asked).asked_again(killed=20.0) == (1, 1)


def test_rows_take_the_place_of_those_of_the_same_job_in_the_order_of_the_jobs() -> None:
    other = dataclasses.replace(GOOD, job="features")
    page = f"before\n\n{HEAD}\n{other.row}\n{GOOD.row}\n\nlast printed 1 May 2020, by hand.\n"
    new = [dataclasses.replace(GOOD, victim=victim, lost=7) for victim in (DRIVER, WORKER)]
    made = with_rows(page, new)
    assert made.startswith(f"before\n\n{HEAD}\n{new[0].row}\n{new[1].row}\n{other.row}\n\nlast ")
    assert "2020" not in made and made.endswith(", by hand.\n")
    with pytest.raises(ValueError, match="no table"):
        with_rows("a page", new)


def test_the_page_has_a_table_to_put_rows_in() -> None:
    page = DOCS.read_text()
    assert "last printed " in page and GOOD.row in with_rows(page, [GOOD])


def test_the_moments_are_watched_where_the_jobs_pass_them(monkeypatch: pytest.MonkeyPatch) -> None:
    passed = {}
    for owner, name in WATCHED:
        passed[owner, name] = list(inspect.signature(getattr(owner, name)).parameters)
        monkeypatch.setattr(owner, name, getattr(owner, name))  # as it is put back in the end
    arm()
    for owner, name in WATCHED:
        inspect.signature(getattr(owner, name)).bind(*passed[owner, name])
