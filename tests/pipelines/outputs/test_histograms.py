"""Histograms: counts of parts add up to those of the whole, and drawings hold every record."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from dim import records
from pipelines.outputs import histograms
from pipelines.outputs.files import fit

RNG = np.random.default_rng(5)
VALUES = {
    "ssim": RNG.uniform(-0.2, 1, 500),
    "pixels": np.exp(RNG.uniform(np.log(3e3), np.log(4e7), 500)).round(),
    "changed": np.concatenate([np.zeros(7), RNG.uniform(0, 1, 493)]),
}


def table(rows: list[dict[str, Any]], schema: pa.Schema) -> pa.Table:
    return fit(pa.Table.from_pylist(rows), schema)


def kept(first: int = 0, end: int = 500) -> pa.Table:
    measured = [
        [{"name": name, "value": float(values[n])} for name, values in VALUES.items()]
        for n in range(first, end)
    ]
    return pa.table({"id": [str(n) for n in range(first, end)], "measures": measured})


def rejected(reason: str, value: float | None, threshold: float | None, **measures: float) -> Any:
    return {
        "reason": reason,
        "value": value,
        "threshold": threshold,
        "measures": [{"name": name, "value": value} for name, value in measures.items()],
    }


def test_parts_add_up_to_the_whole() -> None:
    whole = histograms.count(kept())
    parts: histograms.Counts = {}
    for first in range(460, -1, -20):
        histograms.add(parts, histograms.count(kept(first, first + 20)))
    histograms.add(parts, histograms.count(kept(480, 500)))
    assert json.dumps(histograms.in_order(parts)) == json.dumps(histograms.in_order(whole))
    for name, values in VALUES.items():
        counts = whole[name]["kept"]
        assert sum(counts.values()) == 500
        assert counts == histograms.in_order(whole)[name]["kept"]
        exact = [
            value if value == round(value) < 10_000 else float(f"{value:.1e}") for value in values
        ]
        assert sorted(float(text) for text in counts) == sorted(set(exact))
        assert all(counts[f"{value:g}"] == exact.count(value) for value in set(exact))


def test_counts_stay_small_however_many_records_there_are() -> None:
    many = pa.table(
        {"measures": [[{"name": "ssim", "value": value}] for value in RNG.random(9999)]}
    )
    counts = histograms.count(many)["ssim"]["kept"]
    assert sum(counts.values()) == 9999 and len(counts) < 4 * 90


def test_series_say_whose_rejection_it_was() -> None:
    rows = [
        rejected("image.too_small", 20, 32, side=20.0, pixels=400.0),
        rejected("pair.unchanged", 0, 0.001, side=96.0, changed=0.0),
        rejected("duplicate.near", 3, 6, side=96.0),
        rejected("triage.no", None, None, side=96.0),
        rejected("other.nan", float("nan"), 1, side=float("nan"), pixels=float("inf")),
    ]
    assert histograms.in_order(histograms.count(table(rows, records.REJECT))) == {
        "changed": {"rejected by this filter": {"0": 1}},
        "duplicate.near": {"rejected by this filter": {"3": 1}},
        "pixels": {"rejected by another": {"400": 1}},
        "side": {"rejected by another": {"96": 3}, "rejected by this filter": {"20": 1}},
    }


@pytest.mark.parametrize("schema", [records.T2I, records.REJECT, records.RAW_IMAGE])
def test_no_records_are_no_counts(schema: pa.Schema) -> None:
    assert histograms.count(schema.empty_table()) == {}
    assert histograms.count(table([{"id": "a", "measures": []}], records.T2I)) == {}


def test_drawings_hold_every_record_where_it_is() -> None:
    limits = {"ssim": {"min_ssim": 0.1}, "changed": {"min_changed": 0.001}, "side": {"min_side": 9}}
    drawn = {each.name: each for each in histograms.draw(histograms.count(kept()), limits)}
    assert list(drawn) == ["pixels", "changed", "ssim"]  # in the order of the filters
    assert drawn["pixels"].log and not drawn["ssim"].log and not drawn["changed"].log
    assert drawn["ssim"].limits == {"min_ssim": 0.1} and drawn["pixels"].limits == {}
    for name, values in VALUES.items():
        found = drawn[name]
        assert found.edges[0] <= values.min() and values.max() <= found.edges[-1]
        assert found.series["kept"].sum() == pytest.approx(500)
        # Two digits move a value by a twentieth at most, which is a part of a bar.
        exact = np.histogram(values, found.edges)[0]
        assert np.abs(np.cumsum(found.series["kept"]) - np.cumsum(exact)).max() < 10
    assert drawn["changed"].series["kept"][0] >= 7


@pytest.mark.parametrize("value", [0.0, 512.0, -1.0, 3e7])
def test_a_value_without_neighbours_is_one_bar(value: float) -> None:
    """Pictures of one size have one side, and not about that."""
    counts = {f"{value:g}": 5}
    (alone,) = histograms.draw({"side": {"kept": counts}}, {})
    assert (alone.edges[0], alone.edges[-1]) == (value - 0.5, value + 0.5)
    assert [round(bar["height"]) for bar in alone.bars()] == [120]
    (limited,) = histograms.draw({"side": {"kept": counts}}, {"side": {"min_side": value - 9}})
    assert limited.series["kept"].tolist() == [0.0] * 39 + [5.0]


def test_sides_of_pictures_are_counted_as_they_are() -> None:
    """Or what is just large enough would lie on the other side of its limit."""
    sides = [511, 512, 512, 513, 1024, 9999, 20_049]
    part = pa.table({"measures": [[{"name": "side", "value": float(side)}] for side in sides]})
    counts = histograms.count(part)
    expected = {"511": 1, "512": 2, "513": 1, "1024": 1, "9999": 1, "20000": 1}
    assert counts == {"side": {"kept": expected}}
    (drawn,) = histograms.draw(counts, {"side": {"min_side": 512}})
    places = [np.searchsorted(drawn.edges, side, side="right") - 1 for side in (511, 1024, 9999)]
    assert [drawn.series["kept"][place] for place in places] == [4, 1, 1]


def test_neighbours_of_two_digits_are_spread_over_the_bars_between() -> None:
    counts = {f"{number / 100:g}": 10 for number in range(90, 100)}
    (drawn,) = histograms.draw({"ssim": {"kept": counts}}, {})
    assert drawn.edges[0] == pytest.approx(0.895) and drawn.edges[-1] == pytest.approx(0.995)
    assert drawn.series["kept"] == pytest.approx(np.full(40, 2.5))
