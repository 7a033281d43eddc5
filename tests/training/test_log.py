from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from infra.tracking import TrackingError
from training.log import SAID, RunLog


def test_rows_wait_until_the_tracker_is_back(store: Any, capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(store)
    store.away = True
    log.add(1, {"loss": 1.0})
    log.flush()
    log.add(2, {"loss": 0.5})
    log.flush()
    log.picture(Image.new("RGB", (2, 2)), "a.png")
    assert store.rows == []
    assert capfd.readouterr().out.count("training goes on, metrics are kept") == 1
    store.away = False
    log.flush()
    assert store.rows == [(1, {"loss": 1.0}), (2, {"loss": 0.5})]


def test_a_tracker_that_stays_away_is_an_error_in_the_end(store: Any) -> None:
    log = RunLog(store)
    log.add(1, {"loss": 1.0})
    store.away = True
    with pytest.raises(TrackingError):
        log.close()
    store.away = False
    log.close()
    assert store.rows == [(1, {"loss": 1.0})]


def test_the_last_lines_said_are_a_tag(store: Any) -> None:
    log = RunLog(store)
    for number in range(30):
        log.say(f"line {number}\nand more")
    lines = store.tags[SAID].splitlines()
    assert len(lines) == 20 and lines[-2].endswith("line 29") and lines[-1].endswith("and more")


def test_other_ranks_say_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    log = RunLog(None)
    log.add(1, {"loss": 1.0})
    log.say("nothing")
    log.picture(Image.new("RGB", (2, 2)), "a.png")
    log.close()
    assert capfd.readouterr().out == ""


def test_what_validation_found_is_noted_and_said(
    store: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    log = RunLog(store)
    found = {"validation_loss": 0.25, "validation_exact": 1.0}
    log.validation(7, found, Image.new("RGB", (2, 2)))
    log.close()
    assert store.rows == [(7, found)] and store.figures == ["validation/step-00000007.png"]
    assert capfd.readouterr().out == "validation after step 7: loss 0.250, exact 1.000\n"
