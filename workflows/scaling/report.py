"""The plan in words: tables for a terminal, Markdown for a page, numbers for a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.table import Table

from workflows.scaling.costs import Costs
from workflows.scaling.settings import PlanConfig
from workflows.scaling.stages import Stage

Row = tuple[str, ...]

_TIME = ("stage", "records", "hours", "GPU hours", "CPU hours", "waits for", "knob")
_MONEY = ("stage", "calls", "tokens in", "tokens out", "calls $", "machines $", "requests $")
_STORE = ("stage", "kept", "files", "ranges", "reads/s", "writes/s", "driver")

TITLES = ("Time and devices", "Calls and money", "Storage and the driver")


def tables(found: Sequence[Stage], config: PlanConfig) -> list[tuple[str, list[Row]]]:
    """Titles and rows, of which the first is the head and the last the sum of all stages."""
    return [
        (TITLES[0], [_TIME, *map(_time, found), _time_in_all(found)]),
        (TITLES[1], [_MONEY, *map(_money, found), _money_in_all(found)]),
        (TITLES[2], [_STORE, *map(_stored, found), _stored_in_all(found, config)]),
    ]


def in_terminal(found: Sequence[Stage], config: PlanConfig) -> list[Table]:
    """The tables for a terminal."""
    made = []
    for title, (head, *rows) in tables(found, config):
        table = Table(title=title)
        for number, name in enumerate(head):
            table.add_column(name, justify="left" if number == 0 else "right", overflow="fold")
        for row in rows[:-1]:
            table.add_row(*row)
        table.add_section()
        table.add_row(*rows[-1])
        made.append(table)
    return made


def in_markdown(found: Sequence[Stage], config: PlanConfig, costs: Costs) -> str:
    """The same for a page, with what the costs were measured by."""
    parts = []
    for title, (head, *rows) in tables(found, config):
        lines = [_line(head), _line(["---", *["---:"] * (len(head) - 1)]), *map(_line, rows)]
        parts.append(f"**{title}**\n\n" + "\n".join(lines))
    parts.append(said_of(costs))
    return "\n\n".join(parts)


def said_of(costs: Costs) -> str:
    """By what the costs were measured, when and where, in one sentence."""
    return (
        f"Costs of the data jobs: `{costs.command}`, {costs.date:%d %B %Y}, {costs.machine}, "
        f"pictures of {costs.megapixels:g} megapixels."
    )


def in_json(found: Sequence[Stage], config: PlanConfig) -> list[dict[str, Any]]:
    """An object a stage."""
    return [
        {
            "stage": stage.name,
            "records": stage.records,
            "hours": stage.wall_hours,
            "hours_by_resource": stage.hours,
            "bottleneck": stage.bottleneck,
            "knob": stage.knob,
            "gpus": stage.gpus,
            "gpu_hours": stage.gpu_hours,
            "input_tokens": stage.tokens[0],
            "output_tokens": stage.tokens[1],
            "usd": {
                "calls": stage.calls_usd,
                "machines": stage.devices_usd,
                "store_requests": stage.store_usd,
                "storage_a_month": _a_month(stage, config),
            },
            "stored_bytes": stage.stored_bytes,
            "files": stage.files,
            "ranges": stage.ranges,
            "reads_per_second": stage.per_second(stage.amounts.reads),
            "writes_per_second": stage.per_second(stage.amounts.writes),
            **stage.amounts.model_dump(),
        }
        for stage in found
    ]


def _time(stage: Stage) -> Row:
    return (
        stage.name,
        f"{stage.records:,}",
        _number(stage.wall_hours),
        _number(stage.gpu_hours),
        _number(stage.amounts.cpu_seconds / 3600),
        stage.bottleneck,
        stage.knob,
    )


def _time_in_all(found: Sequence[Stage]) -> Row:
    hours, gpus = _sums(found, lambda s: s.wall_hours, lambda s: s.gpu_hours)
    cores = sum(stage.amounts.cpu_seconds for stage in found) / 3600
    return "one after the other", "", _number(hours), _number(gpus), _number(cores), "", ""


def _money(stage: Stage) -> Row:
    return (
        stage.name,
        _number(stage.amounts.calls),
        _number(stage.tokens[0]),
        _number(stage.tokens[1]),
        _number(stage.calls_usd),
        _number(stage.devices_usd),
        _number(stage.store_usd),
    )


def _money_in_all(found: Sequence[Stage]) -> Row:
    sums = _sums(
        found, lambda s: s.amounts.calls, lambda s: s.tokens[0], lambda s: s.tokens[1],
        lambda s: s.calls_usd, lambda s: s.devices_usd, lambda s: s.store_usd,
    )  # fmt: skip
    return ("in all", *map(_number, sums))


def _stored(stage: Stage) -> Row:
    return (
        stage.name,
        _bytes(stage.stored_bytes),
        f"{stage.files:,}",
        f"{stage.ranges:,}" if stage.ranges else "–",
        _number(stage.per_second(stage.amounts.reads)),
        _number(stage.per_second(stage.amounts.writes)),
        _bytes(stage.driver_bytes) if stage.driver_bytes else "–",
    )


def _stored_in_all(found: Sequence[Stage], config: PlanConfig) -> Row:
    stored, files = _sums(found, lambda s: s.stored_bytes, lambda s: s.files)
    month = sum(_a_month(stage, config) for stage in found)
    return ("in all", f"{_bytes(stored)}, ${month:,.0f} a month", f"{files:,.0f}", *[""] * 4)


def _a_month(stage: Stage, config: PlanConfig) -> float:
    return stage.stored_bytes / 1e9 * config.store.price_per_gigabyte_month


def _sums(found: Sequence[Stage], *of: Callable[[Stage], float]) -> list[float]:
    return [sum(take(stage) for stage in found) for take in of]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    """Three digits that count, and a unit of thousands."""
    for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    if value >= 100:
        return f"{value:,.0f}"
    return "–" if value == 0 else f"{value:.2g}" if value < 10 else f"{value:.1f}"


def _bytes(value: float) -> str:
    for size, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e3:.3g} kB"
