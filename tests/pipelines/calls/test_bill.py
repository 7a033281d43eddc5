from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from dim.designers.calls.usage import Answer, Unusable, Usage
from infra.storage import Store, open_store
from pipelines.calls import bill
from pipelines.calls.answers import Answers, Entry, read_entries
from pipelines.calls.bill import read_costs, sums_of, total_cost, write_bill


def test_the_bill_is_by_record_and_in_all(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    one, two = Answers(store, "one"), Answers(store, "two")
    one.add("a1", Answer("x", Usage(100, 10, 0.5, 1.0)), "a")
    one.add("a2", Answer("y", Usage(200, 20, 0.25, 2.0)), "a")
    two.add("b1", Unusable("cut off", Usage(50, 5, 0.125, 0.5)), "b")
    two.add("c1", Unusable("answered nothing", Usage(7, 0, 0.0, 0.5), final=False), 'c, "quoted"')
    write_bill(store)
    sums = read_costs(store)
    assert sums == {"requests": 4, "input_tokens": 357, "output_tokens": 35, "usd": 0.875}
    assert total_cost(store).usd == 0.875
    lines = list(csv.DictReader((tmp_path / "bill.csv").read_text().splitlines()))
    assert [line["id"] for line in lines] == ["a", "b", 'c, "quoted"']
    assert lines[0] == {
        "id": "a",
        "requests": "2",
        "input_tokens": "300",
        "output_tokens": "30",
        "usd": "0.75000000",
        "seconds": "3.000",
    }
    assert sum(int(line["requests"]) for line in lines) == 4


def test_a_job_that_asked_nobody_has_an_empty_bill(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    write_bill(store)
    assert read_costs(store) == {"requests": 0, "input_tokens": 0, "output_tokens": 0, "usd": 0}
    assert (tmp_path / "bill.csv").read_text().count("\n") == 1


def test_answers_that_were_summed_up_are_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(str(tmp_path))
    for name, tokens in (("one", 100), ("two", 10), ("three", 1)):
        with Answers(store, name) as answers:
            answers.add(f"{name}1", Answer("x", Usage(tokens, 0, 0.5, 1.0)), name)
    known = {name: sums_of(store, name) for name in ("one", "two", "gone")}
    assert known["one"] | {"bytes": 0} == {
        "bytes": 0,
        "requests": 1,
        "input_tokens": 100,
        "output_tokens": 0,
        "usd": 0.5,
        "seconds": 1.0,
    }
    with Answers(store, "two") as answers:  # somebody else works on that range too
        answers.add("two2", Answer("y", Usage(20, 0, 0.5, 1.0)), "two")
    read: list[str] = []

    def spy(store: Store, names: Iterable[str] | None = None) -> Iterator[Entry]:
        read.extend(name.split("/")[1] for name in names or [])
        return read_entries(store, names)

    monkeypatch.setattr(bill, "read_entries", spy)
    sums = read_costs(store, known)
    assert sums == {"requests": 4, "input_tokens": 131, "output_tokens": 0, "usd": 2.0}
    assert sorted(read) == ["three", "two", "two"]
    assert read_costs(store) == sums
