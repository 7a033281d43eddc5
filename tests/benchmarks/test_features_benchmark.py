from __future__ import annotations

import pytest

from benchmarks import features
from benchmarks.features import Result


@pytest.mark.parametrize(
    ("read", "held", "loss", "failures"),
    [
        (1.0, 0.9, 0.501, []),
        (2.1, 0.9, 0.501, ["features that are read are not 1 times as fast as live"]),
        (1.0, 2.2, 0.501, ["features that are held are not 1 times as fast as live"]),
        (1.0, 0.9, 0.51, ["features that are held give other losses than live ones"]),
    ],
)
def test_a_comparison_that_is_lost_fails(
    capsys: pytest.CaptureFixture[str], read: float, held: float, loss: float, failures: list[str]
) -> None:
    result = Result(
        {"live": 2.0, "read": read, "held": held},
        {"live": [0.4, 0.5], "read": [0.4, 0.5], "held": [0.4, loss]},
        samples=20,
    )
    assert features._report(result, 1.0) == (1 if failures else 0)
    said, failed = capsys.readouterr()
    assert "live      10.0 samples/s    1.00 x live" in said
    assert failed.splitlines() == [f"FAILED: {failure}" for failure in failures]
