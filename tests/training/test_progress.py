"""What rank 0 says reaches the driver, all of it and in order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ray
from rich.console import Console

from training.progress import find_teller, progress_bar, watch


@ray.remote(num_cpus=0)
def speak(run_id: str, count: int) -> bool:
    tell = find_teller(run_id)
    if tell is None:
        return False
    for number in range(count):
        tell([f"line {number}"], {"loss": float(number)} if number % 2 else {"rate": 1.0})
    return True


def test_every_line_and_the_latest_metrics_arrive(ray_cluster: None) -> None:
    said: list[str] = []
    seen: list[Mapping[str, float]] = []

    def on_progress(lines: Sequence[str], metrics: Mapping[str, float]) -> None:
        said.extend(lines)
        seen.append(metrics)

    with watch("some-run", on_progress):
        assert ray.get(speak.remote("some-run", 500))
    assert said == [f"line {number}" for number in range(500)]
    assert seen[-1] == {"loss": 499.0, "rate": 1.0}


def test_where_nobody_watches_nobody_is_told(ray_cluster: None) -> None:
    with watch("other-run", None):
        assert not ray.get(speak.remote("other-run", 1))
    said: list[str] = []
    with watch("other-run", lambda lines, metrics: said.extend(lines)):
        pass
    assert said == [] and not ray.get(speak.remote("other-run", 1))


def test_the_bar_shows_lines_and_shares() -> None:
    console = Console(record=True, width=120, force_terminal=False)
    with progress_bar(console, "edit1") as show:
        show(["10:00:00 edit1: 20 samples [all]"], {"features_done": 0.5})
        show([], {"progress": 1.0, "loss": 0.25, "samples_per_second": 40.0})
    text = console.export_text()
    assert "edit1: 20 samples [all]" in text
    assert "100%" in text and "loss 0.2500 · 40 samples/s" in text
