"""The benchmarks of the server at their smallest: they measure, and their bars can be missed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks import serving, serving_load, serving_soak
from benchmarks.serving_load import Waited, arrivals
from serving.serve import Server


@pytest.fixture(scope="module")
def server(ray_cluster: None, tiny_model_dir: Path) -> Iterator[Server]:
    with serving.served(str(tiny_model_dir)) as server:
        yield server


@pytest.fixture(scope="module")
def plain(tiny_model_dir: Path) -> Iterator[str]:
    with serving_load.plain(str(tiny_model_dir)) as url:
        yield url


def test_a_request_alone_and_sixteen_clients(
    server: Server, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serving._alone(server, str(tiny_model_dir), 2)
    asked = [serving.Asked(seed, steps=2) for seed in range(6)]
    options = argparse.Namespace(rounds=1, target=1000.0)
    (missed,) = serving._together(server, "alike", asked, options)
    assert "alike: 16 clients are" in missed and "not 1000" in missed
    assert serving._together(server, "alike", asked, argparse.Namespace(rounds=1, target=0)) == []
    printed = capsys.readouterr().out
    assert printed.startswith("alone: call ") and "alike: " in printed


def test_requests_that_come_when_they_come(
    server: Server, plain: str, capsys: pytest.CaptureFixture[str]
) -> None:
    failures = serving_load.measure(server.url, plain, 8)
    assert all(said.startswith("p99 is ") for said in failures)  # of eight, either may be faster
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[0] for line in lines] == ["capacity:", "capacity:", "at", "at", "at"]
    assert all("0 failed" in line and "p99" in line for line in lines[2:])


def test_the_plain_server_paints_the_same_image(server: Server, plain: str) -> None:
    body = serving.Asked(3, (64, 32), 4).body
    ours, theirs = (
        httpx.post(f"{url}/v1/images/generations", json=body, timeout=60).json()["data"][0]
        for url in (server.url, plain)
    )
    from tests.serving.fakes import opened

    assert np.array_equal(opened(ours["b64_json"]), opened(theirs["b64_json"]))


def test_a_soak_and_its_bar(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    assert serving_soak.measure(server.url, 20, 24, 1000.0) == []
    printed = capsys.readouterr().out
    assert "mixed: 20 requests" in printed and "'answered': 20" in printed
    assert "'streamed': 6" in printed and "painter " in printed and "ingress " in printed
    grown = serving_soak.measure(server.url, 5, 4, -1000.0)
    assert any("painter has grown by" in said for said in grown)


def test_requests_come_at_the_rate_they_are_drawn_with() -> None:
    moments = arrivals(4000, 20.0, 1)
    assert moments == sorted(moments) == arrivals(4000, 20.0, 1)
    assert 4000 / moments[-1] == pytest.approx(20.0, rel=0.1)
    gaps = np.diff(moments)
    assert np.std(gaps) == pytest.approx(np.mean(gaps), rel=0.1)  # exponential, not even


def test_the_slowest_hundredth_is_of_those_that_were_answered() -> None:
    waited = Waited([float(ms) for ms in range(1, 101)], failed=2)
    assert waited.percentile(99) == pytest.approx(99.01)
    assert str(waited) == "p50 50 ms, p90 90 ms, p99 99 ms, 2 failed"
