from __future__ import annotations

import threading
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pytest

from dim.designers.calls.usage import Answer, Unusable, Usage
from dim.errors import StorageError
from infra.storage import Store, join, open_store
from pipelines.calls import answers as kept
from pipelines.calls.answers import (
    Answers,
    answer_key,
    gather_earlier,
    read_entries,
    set_unusable_aside,
)
from pipelines.ranges import Piece, names_of

COST = Usage(1000, 200, 0.004, 1.5)


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    uri = str(tmp_path / "out") if request.param == "local" else request.getfixturevalue("s3")
    return open_store(join(uri, "job"))


@pytest.fixture
def bucket(s3: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    """On an object store, where nothing is stored before somebody says so."""
    monkeypatch.setattr(kept, "_EVERY_S", 1000.0)
    return open_store(s3)


def test_an_answer_is_there_for_the_next_process(store: Store) -> None:
    with Answers(store, "a") as first:
        first.add("a", "one\nwith 🙂 and \u2028")
        assert first.get("a") == "one\nwith 🙂 and \u2028"
    assert Answers(store, "a").find(["a", "b"]) == {"a": "one\nwith 🙂 and \u2028"}


def test_workers_do_not_share_files(store: Store) -> None:
    with Answers(store, "a") as one, Answers(store, "a") as two:
        one.add("a", "1")
        two.add("b", "2")
        one.add("c", "3")
    assert Answers(store, "a").find("abc") == {"a": "1", "b": "2", "c": "3"}
    assert len(store.list("answers")) >= 2


def test_a_worker_reads_the_answers_of_its_own_range_only(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        with Answers(store, name) as answers:
            answers.add(name, name)
    read, opened = Store.read, list[str]()
    monkeypatch.setattr(
        Store, "read", lambda self, name="": opened.append(name) or read(self, name)
    )
    assert Answers(store, "a").find("ab") == {"a": "a"}
    assert [name.split("/")[1] for name in opened] == ["a"]


def test_a_line_cut_by_a_kill_costs_that_answer_only(store: Store) -> None:
    with Answers(store, "a") as answers:
        answers.add("a", "1")
    (name, _), *_ = store.list("answers")
    store.write("answers/a/torn.jsonl", store.read(name) + b'{"key": "b", "answ')
    with Answers(store, "a") as later:
        assert later.find("ab") == {"a": "1"}
        later.add("b", "2")
    assert Answers(store, "a").get("b") == "2"


def test_many_at_once(store: Store) -> None:
    with Answers(store, "a") as answers:
        threads = [
            threading.Thread(target=answers.add, args=(str(n), f"answer {n}")) for n in range(40)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [Answers(store, "a").get(str(n)) for n in range(40)] == [
        f"answer {n}" for n in range(40)
    ]


def test_the_answers_of_a_second_are_one_object(bucket: Store) -> None:
    with Answers(bucket, "a") as answers:
        for n in range(20):
            answers.add(str(n), "x")
        assert bucket.list("answers") == []
    assert len(bucket.list("answers")) == 1
    assert len(Answers(bucket, "a").find([str(n) for n in range(20)])) == 20


def test_an_answer_is_stored_also_if_none_follows_it(
    s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = threading.Event()
    write = Store.write

    def watched(self: Store, name: str, data: bytes) -> None:
        write(self, name, data)
        written.set()

    monkeypatch.setattr(Store, "write", watched)
    answers = Answers(open_store(s3), "a")
    answers.add("a", "1")
    assert written.wait(20)
    assert Answers(open_store(s3), "a").get("a") == "1"


def test_a_refused_upload_costs_no_answer(bucket: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    write, answers = Store.write, Answers(bucket, "a")

    def refuse(self: Store, name: str, data: bytes) -> None:
        raise StorageError("the bucket is full")

    monkeypatch.setattr(Store, "write", refuse)
    answers.add("a", "1")
    answers._writer._upload_in_time()  # type: ignore[union-attr]
    with pytest.raises(StorageError, match="bucket is full"):
        answers.add("b", "2")
    with pytest.raises(StorageError, match="bucket is full"):
        answers.close()
    monkeypatch.setattr(Store, "write", write)
    answers.close()
    assert Answers(bucket, "a").find("ab") == {"a": "1", "b": "2"}


def test_a_range_has_its_name_wherever_it_is_looked_at() -> None:
    """In the driver, and as a row of a data set; and no other range has it."""
    ranges = [[Piece("a", 0, 2), Piece("a", 1, 2)], [Piece("a", 0, 2)], [Piece("b", 0, 2, 1, 3)]]
    rows = [{"number": 1, "pieces": [asdict(piece) for piece in each]} for each in ranges]
    travelled = pa.Table.from_pylist(rows).to_pylist()
    assert [kept.name_of(row["pieces"]) for row in travelled] == names_of(ranges)
    assert len(set(names_of(ranges))) == len(ranges)


def test_keys_differ_in_every_part() -> None:
    base = ("openai:m", "v1", "image", "target", "do it")
    changed = [(*base[:n], "other", *base[n + 1 :]) for n in range(len(base))]
    keys = {answer_key(*parts) for parts in [base, *changed, (*base[:3], None, base[4])]}
    assert len(keys) == len(base) + 2
    assert answer_key("ab", "c") != answer_key("a", "bc")


def test_what_an_answer_cost_and_whom_it_was_for_is_kept(store: Store) -> None:
    with Answers(store, "a") as answers:
        answers.add("a", Answer("one", COST), "record-1")
        answers.add("b", "free")
    entries = {entry.key: entry for entry in read_entries(store)}
    assert (entries["a"].reply, entries["a"].usage) == ("one", COST)
    assert entries["a"].record == "record-1"
    assert (entries["b"].usage, entries["b"].record) == (None, "")


def test_a_useless_answer_is_not_paid_for_again_until_it_is_set_aside(store: Store) -> None:
    with Answers(store, "a") as answers:
        answers.add("a", Unusable("refused: no", COST), "record-1")
    known = Answers(store, "a").get("a")
    assert isinstance(known, Unusable) and str(known) == "refused: no"
    earlier = gather_earlier(store, ["other"])
    assert isinstance(Answers(store, "other", earlier).get("a"), Unusable)
    set_unusable_aside(store)
    assert Answers(store, "a").get("a") is None and gather_earlier(store, ["other"]) is None
    (entry,) = read_entries(store)
    assert (entry.reply, entry.usage) == (None, COST)  # still on the bill
    with Answers(store, "a") as later:
        later.add("a", "yes")
    set_unusable_aside(store)
    assert Answers(store, "a").get("a") == "yes"


def test_a_usable_answer_wins_over_a_useless_one(store: Store) -> None:
    with Answers(store, "a") as answers:
        answers.add("a", "yes")
        answers.add("a", Unusable("refused: no", COST))
        assert answers.get("a") == "yes"
    assert Answers(store, "a").get("a") == "yes"


def test_an_empty_answer_is_on_the_bill_only(store: Store) -> None:
    with Answers(store, "a") as answers:
        answers.add("a", Unusable("answered nothing", COST, final=False))
        assert answers.get("a") is None
    assert Answers(store, "a").get("a") is None
    assert [entry.usage for entry in read_entries(store)] == [COST]


def test_answers_of_older_versions_and_of_ranges_cut_otherwise_are_read(store: Store) -> None:
    """Older ones lie in ``answers/`` itself, an object each on an object store."""
    for n in range(3):
        store.write(f"answers/old-{n}.jsonl", f'{{"key": "{n}", "answer": "{n}"}}\n'.encode())
    store.write("answers/no.unusable", b'{"key": "0", "error": "cut off"}\n{"key": 3}\nnull\n')
    for name in ("cut-otherwise", "now"):
        with Answers(store, name) as answers:
            answers.add(name, Answer("paid", COST), "record")
    earlier = gather_earlier(store, ["now", "new"])
    assert earlier is not None and earlier == gather_earlier(store, ["now", "new"])
    wanted = ["0", "1", "2", "3", "cut-otherwise", "now"]
    assert Answers(store, "new", earlier).find(wanted) == {
        **{"0": "0", "1": "1", "2": "2"},
        "cut-otherwise": "paid",
    }
    bill = sorted(entry.key for entry in read_entries(store))
    assert bill == ["0", "0", "1", "2", "cut-otherwise", "now"]  # each once, as before
    assert gather_earlier(store, []) != earlier
