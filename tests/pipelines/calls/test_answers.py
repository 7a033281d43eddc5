from __future__ import annotations

import itertools
import threading
import time
from pathlib import Path

import pytest

from dim.designers.calls.usage import Answer, Unusable, Usage
from dim.errors import StorageError
from infra.storage import Store, join, open_store
from pipelines.calls.answers import Answers, answer_key, read_entries, set_unusable_aside

COST = Usage(1000, 200, 0.004, 1.5)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")
    return open_store(join(uri, "job"))


def test_an_answer_is_there_for_the_next_process(store: Store) -> None:
    first = Answers(store)
    first.add("a", "one\nwith 🙂 and \u2028")
    assert first.get("a") == "one\nwith 🙂 and \u2028"
    assert Answers(store).get("a") == "one\nwith 🙂 and \u2028"
    assert Answers(store).get("b") is None


def test_workers_do_not_share_files(store: Store) -> None:
    one, two = Answers(store), Answers(store)
    one.add("a", "1")
    two.add("b", "2")
    one.add("c", "3")
    later = Answers(store)
    assert [later.get(key) for key in "abc"] == ["1", "2", "3"]
    assert len({name for name, _ in store.list("answers")}) >= 2


def test_a_line_cut_by_a_kill_costs_that_answer_only(store: Store) -> None:
    Answers(store).add("a", "1")
    (name, _), *_ = store.list("answers")
    store.write("answers/torn.jsonl", store.read(name) + b'{"key": "b", "answ')
    later = Answers(store)
    assert later.get("a") == "1" and later.get("b") is None
    later.add("b", "2")
    assert Answers(store).get("b") == "2"


def test_many_at_once(store: Store) -> None:
    answers = Answers(store)
    threads = [
        threading.Thread(target=answers.add, args=(str(n), f"answer {n}")) for n in range(40)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    later = Answers(store)
    assert [later.get(str(n)) for n in range(40)] == [f"answer {n}" for n in range(40)]


def test_answers_that_come_during_an_upload_share_the_next(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3)
    write = Store.write

    def slow(self: Store, name: str, data: bytes) -> None:
        time.sleep(0.1)
        write(self, name, data)

    monkeypatch.setattr(Store, "write", slow)
    answers = Answers(store)
    threads = [threading.Thread(target=answers.add, args=(str(n), "x")) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(store.list("answers")) <= 4
    assert all(Answers(store).get(str(n)) == "x" for n in range(20))


def test_keys_differ_in_every_part() -> None:
    base = ("openai:m", "v1", "image", "target", "do it")
    changed = [(*base[:n], "other", *base[n + 1 :]) for n in range(len(base))]
    keys = {answer_key(*parts) for parts in [base, *changed, (*base[:3], None, base[4])]}
    assert len(keys) == len(base) + 2
    assert answer_key("ab", "c") != answer_key("a", "bc")


def test_what_an_answer_cost_and_whom_it_was_for_is_kept(store: Store) -> None:
    answers = Answers(store)
    answers.add("a", Answer("one", COST), "record-1")
    answers.add("b", "free")
    entries = {entry.key: entry for entry in read_entries(store)}
    assert (entries["a"].reply, entries["a"].usage) == ("one", COST)
    assert entries["a"].record == "record-1"
    assert (entries["b"].usage, entries["b"].record) == (None, "")


def test_a_useless_answer_is_not_paid_for_again_until_it_is_set_aside(store: Store) -> None:
    Answers(store).add("a", Unusable("refused: no", COST), "record-1")
    later = Answers(store)
    known = later.get("a")
    assert isinstance(known, Unusable) and str(known) == "refused: no"
    set_unusable_aside(store)
    assert Answers(store).get("a") is None
    (entry,) = read_entries(store)
    assert (entry.reply, entry.usage) == (None, COST)  # still on the bill
    later = Answers(store)
    later.add("a", "yes")
    set_unusable_aside(store)
    assert Answers(store).get("a") == "yes"


def test_a_usable_answer_wins_over_a_useless_one(store: Store) -> None:
    answers = Answers(store)
    answers.add("a", "yes")
    answers.add("a", Unusable("refused: no", COST))
    assert answers.get("a") == "yes" == Answers(store).get("a")


def test_an_empty_answer_is_on_the_bill_only(store: Store) -> None:
    answers = Answers(store)
    answers.add("a", Unusable("answered nothing", COST, final=False))
    assert answers.get("a") is None and Answers(store).get("a") is None
    assert [entry.usage for entry in read_entries(store)] == [COST]


def test_answers_of_older_versions_are_read(store: Store) -> None:
    store.write("answers/old.jsonl", b'{"key": "a", "answer": "1"}\n{"key": 3}\nnull\n')
    assert Answers(store).get("a") == "1"


def test_a_refused_upload_costs_nobody_elses_answer(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3)
    answers = Answers(store)
    write, uploads, errors = Store.write, itertools.count(), []

    def refuse_the_second(self: Store, name: str, data: bytes) -> None:
        time.sleep(0.2)  # all the others come during the first, and make the second
        if next(uploads) == 1:
            raise StorageError("the bucket is full")
        write(self, name, data)

    def add(n: int) -> None:
        try:
            answers.add(str(n), "x")
        except StorageError as error:
            errors.append(error)

    monkeypatch.setattr(Store, "write", refuse_the_second)
    threads = [threading.Thread(target=add, args=(n,), daemon=True) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    later = Answers(store)
    assert len(errors) == 1  # whose turn it was to upload
    assert sum(later.get(str(n)) == "x" for n in range(8)) >= 7
