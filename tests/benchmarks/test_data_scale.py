from __future__ import annotations

import pytest
import typer

from benchmarks import data_scale
from benchmarks.row import Row


def rows(fast: float, small: float) -> list[Row]:
    return [
        Row("fast", "a second", 1.0, 10.0, "more", lambda: fast),
        Row("small", "bytes", None, 24.0, "less", lambda: small),
    ]


@pytest.mark.parametrize(
    ("fast", "small", "only", "holds"),
    [
        (10.0, 24.0, "", True),
        (9.9, 24.0, "", False),
        (10.0, 24.1, "", False),
        (9.9, 24.0, "small", True),
    ],
)
def test_a_bar_that_is_missed_is_told_by_the_exit_code(
    fast: float, small: float, only: str, holds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_scale, "rows", lambda: iter(rows(fast, small)))
    if holds:
        data_scale.main(only)
    else:
        with pytest.raises(typer.Exit) as left:
            data_scale.main(only)
        assert left.value.exit_code == 1


def test_every_row_has_a_name_of_its_own_and_an_unknown_one_is_refused() -> None:
    names = [row.name for row in data_scale.rows()]
    assert len(set(names)) == len(names) >= 5
    with pytest.raises(typer.BadParameter, match="no row whose name begins with 'nothing'"):
        data_scale.main("nothing")
