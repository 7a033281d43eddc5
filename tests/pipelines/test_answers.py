from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from infra.storage import Store, join, open_store
from pipelines.answers import Answers, answer_key


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
