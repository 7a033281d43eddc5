from __future__ import annotations

from pydantic import Field

from dim.config import StrictModel, what_decides


class Inner(StrictModel):
    size: int = 1


class Outer(StrictModel):
    named: dict[str, Inner] = Field(default_factory=dict)


def test_settings_by_name_are_taken_as_they_are() -> None:
    assert what_decides(Outer, {"named": {"a": {"size": 2}}}) == {"named": {"a": {"size": 2}}}
