from __future__ import annotations

import csv
from pathlib import Path

from dim.designers.calls.usage import Answer, Unusable, Usage
from infra.storage import open_store
from pipelines.calls.answers import Answers
from pipelines.calls.bill import read_costs, total_cost, write_bill


def test_the_bill_is_by_record_and_in_all(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    one, two = Answers(store, "one"), Answers(store, "two")
    one.add("a1", Answer("x", Usage(100, 10, 0.5, 1.0)), "a")
    two.add("a2", Answer("y", Usage(200, 20, 0.25, 2.0)), "a")
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
