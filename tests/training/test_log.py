from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from PIL import Image
from rich.console import Console

from infra.tracking import TrackingError
from training.log import SAID, LossMeter, RunLog
from training.progress import progress_bar


class Store:
    """Stands in for an MLflow run that can be away for a while."""

    def __init__(self) -> None:
        self.away = False
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.tags: dict[str, str] = {}

    def log_metric_rows(self, rows: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        self._check()
        self.rows += rows

    def set_tags(self, tags: dict[str, str]) -> None:
        self._check()
        self.tags |= tags

    def log_figure(self, image: Image.Image, name: str) -> None:
        self._check()

    def _check(self) -> None:
        if self.away:
            raise TrackingError("MLflow at there cannot log")


@pytest.fixture
def store() -> Any:
    return Store()


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


def test_the_meter_averages_and_starts_anew() -> None:
    meter = LossMeter(torch.device("cpu"), global_batch=8)
    meter.add(torch.tensor(1.0))
    meter.add(torch.tensor(2.0))
    first = meter.read()
    assert first["loss"] == 1.5 and first["samples_per_second"] > 0
    meter.add(torch.tensor(5.0))
    assert meter.read()["loss"] == 5.0


def test_the_bar_shows_lines_and_shares() -> None:
    console = Console(record=True, width=120, force_terminal=False)
    with progress_bar(console, "edit1") as show:
        show(["10:00:00 edit1: 20 samples [all]"], {"features_done": 0.5})
        show([], {"progress": 1.0, "loss": 0.25, "samples_per_second": 40.0})
    text = console.export_text()
    assert "edit1: 20 samples [all]" in text
    assert "100%" in text and "loss 0.2500 · 40 samples/s" in text
