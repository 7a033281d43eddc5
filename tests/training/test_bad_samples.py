"""Bad samples: counted over all workers, said, and too many of them are the end."""

from __future__ import annotations

import pickle
from typing import Any, get_args

import pytest
import torch

from dim.errors import BadSample, SampleError
from training import parallel
from training.bad_samples import BadSamples, TooManyBadSamples

CPU = torch.device("cpu")


class Said:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)


def bad(reason: BadSample, name: str = "x") -> SampleError:
    return SampleError(f"the image of sample {name} is damaged", reason)


def test_they_are_counted_by_reason() -> None:
    counts, said = BadSamples(0.5, rows=100), Said()
    counts.add(40, [])
    assert counts.read(said, CPU) == {"bad_samples": 0.0} and said.lines == []
    counts.add(40, [bad("undecodable"), bad("unreadable"), bad("undecodable")])
    assert counts.read(said, CPU) == {
        "bad_samples": 3.0,
        "bad_samples_undecodable": 2.0,
        "bad_samples_unreadable": 1.0,
    }
    assert said.lines == [
        "3 of 83 samples could not be used and were replaced (2 undecodable, 1 unreadable)"
    ]


@pytest.mark.parametrize("reason", get_args(BadSample))
def test_every_kind_is_counted_and_may_stop_the_run(reason: BadSample) -> None:
    counts = BadSamples(0.5, rows=100)
    counts.add(40, [bad(reason)])
    assert counts.read(Said(), CPU) == {"bad_samples": 1.0, f"bad_samples_{reason}": 1.0}
    counts.add(0, [bad(reason)] * 60)
    with pytest.raises(TooManyBadSamples, match=f"61 {reason}"):
        counts.read(Said(), CPU)


def test_a_line_comes_when_their_number_has_doubled() -> None:
    counts, said = BadSamples(1.0, rows=100), Said()
    for _ in range(9):
        counts.add(1, [bad("undecodable")])
        counts.read(said, CPU)
    assert [line.split()[0] for line in said.lines] == ["1", "2", "4", "8"]


def test_the_first_twenty_are_named_in_the_workers_log(capsys: pytest.CaptureFixture[str]) -> None:
    counts = BadSamples(1.0, rows=100)
    counts.add(30, [bad("undecodable", str(number)) for number in range(15)])
    counts.add(30, [bad("undecodable", str(number)) for number in range(15, 30)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 20
    assert lines[19] == "replaced by its slot's next sample: the image of sample 19 is damaged"


@pytest.mark.parametrize(
    ("allowed", "rows", "used", "number", "stops"),
    [
        (0.01, 10**6, 100, 10, False),  # as if 1,000 had been drawn
        (0.01, 10**6, 100, 11, True),
        (0.01, 10**6, 10_000, 101, False),
        (0.01, 10**6, 10_000, 102, True),
        (0.01, 20, 10, 1, True),  # 20 are all there are
        (0.1, 20, 10, 2, False),
        (0.0, 10**6, 100, 1, True),
        (1.0, 20, 10, 15, False),
    ],
)
def test_too_many_stop_the_run(
    allowed: float, rows: int, used: int, number: int, stops: bool
) -> None:
    counts = BadSamples(allowed, rows)
    counts.add(used, [bad("unreadable", str(one)) for one in range(number)])
    if not stops:
        assert counts.read(Said(), CPU)["bad_samples"] == number
        return
    with pytest.raises(TooManyBadSamples) as caught:
        counts.read(Said(), CPU)
    assert str(caught.value) == (
        f"{number:,} of {used + number:,} samples cannot be used ({number} unreadable), more than "
        f"bad_samples: {allowed:g} allows, such as: the image of sample 0 is damaged"
    )


def test_all_workers_stop_with_the_name_that_one_of_them_knows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workers = [BadSamples(0.01, 100) for _ in range(2)]
    workers[1].add(10, [bad("undecodable", "known to the second")] * 5)
    told = [torch.tensor([0, 0, 0, 0, 0, 0]), torch.tensor([10, 5, 0, 0, 0, 0])]
    monkeypatch.setattr(parallel, "total", lambda value: told[0] + told[1])
    shared: list[Any] = []
    monkeypatch.setattr(parallel, "agree", lambda error: (shared.append(error), error)[1])
    with pytest.raises(TooManyBadSamples, match="known to the second"):
        workers[1].read(Said(), CPU)
    monkeypatch.setattr(parallel, "agree", lambda error: error or shared[0])
    with pytest.raises(TooManyBadSamples, match="5 of 15 .* known to the second"):
        workers[0].read(Said(), CPU)


def test_what_is_wrong_with_a_sample_travels() -> None:
    error = pickle.loads(pickle.dumps(bad("missing_value")))
    assert error.reason == "missing_value" and str(error) == str(bad("missing_value"))
