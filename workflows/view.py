"""What a terminal shows of a workflow: live while it runs, and as tables of its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from workflows.receipts import Receipt, Receipts
from workflows.workflow import Workflow

_WAITS, _RUNS, _DONE, _FAILED = "waits", "runs", "done", "failed"
_COLOURS = {_WAITS: "dim", _RUNS: "cyan", _DONE: "green", _FAILED: "red"}


@dataclass
class _Row:
    state: str = _WAITS
    said: str = ""
    begun: float = 0.0  # by time.monotonic
    seconds: float = 0.0
    share: float | None = None
    usd: float = 0.0


class View:
    """The steps of a running workflow: a live table, or a line for each change where none can be.

    Args:
        console: of the terminal or file.
        names: of the steps, in their order.
    """

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self._console = console
        self._rows = {name: _Row() for name in names}
        self._live = Live(console=console, auto_refresh=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
            self.refresh()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self.refresh()
            self._live.stop()

    def begin(self, name: str, log: Path) -> None:
        """A step begins; what it says goes into ``log``."""
        row = self._rows[name]
        row.state, row.begun, row.said = _RUNS, time.monotonic(), ""
        self._line(f"{name}: begins (log: {log})")

    def tell(self, name: str, share: float | None, said: str, usd: float) -> None:
        """A step is at ``share`` of its work (0 to 1, where that is known), says something, and has
        paid ``usd`` dollars to others."""
        row = self._rows[name]
        row.share, row.said, row.usd = share, said, usd

    def done(
        self, name: str, said: str, seconds: float, usd: float, *, before: bool = False
    ) -> None:
        """A step is done; ``before``: it was when this run began."""
        row = self._rows[name]
        row.state, row.said, row.seconds, row.usd = _DONE, said, seconds, usd
        self._line(f"{name}: {said} ({'done before' if before else _duration(seconds)})")

    def failed(self, name: str, sentence: str) -> None:
        """A step has failed."""
        row = self._rows[name]
        row.state, row.said = _FAILED, sentence
        row.seconds = time.monotonic() - row.begun

    def refresh(self, nodes_usd: float | None = None) -> None:
        """Show how it stands; ``nodes_usd`` is what the cluster's nodes have cost, where known."""
        if self._live is None:
            return
        shown: list[Table | Text] = [self._table()]
        if nodes_usd is not None:
            paid = sum(row.usd for row in self._rows.values())
            line = f"${nodes_usd:,.2f} for nodes in this run, ${paid:,.2f} paid by steps"
            shown.append(Text(line, "dim"))
        self._live.update(Group(*shown), refresh=True)

    def _line(self, text: str) -> None:
        if self._live is None:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _table(self) -> Table:
        table = _steps("step", "", "time", "left", "usd", "")
        for name, row in self._rows.items():
            now = time.monotonic() - row.begun if row.state == _RUNS else row.seconds
            left = ""
            if row.state == _RUNS and row.share:
                left = _duration(now / row.share * (1 - row.share))
            percent = f"{row.share:.0%} " if row.state == _RUNS and row.share is not None else ""
            table.add_row(
                name,
                Text(row.state, _COLOURS[row.state]),
                _duration(now) if now else "",
                left,
                f"{row.usd:.2f}" if row.usd else "",
                Text(f"{percent}{row.said}", overflow="ellipsis", no_wrap=True),
            )
        return table


def plan_table(workflow: Workflow, receipts: Receipts, begin_at: str | None) -> Table:
    """What a run would do, step by step."""
    again = set() if begin_at is None else {begin_at, *workflow.following(begin_at)}
    table = _steps("step", "runs", "takes", "", "leaves")
    digests: dict[str, str] = {}
    for step in workflow.steps.values():
        known = all(name in digests for name in step.inputs)
        inputs = {name: digests.get(name, "") for name in step.inputs}
        if step.name in again:
            what = "is made again"
        elif known and receipts.is_done(step, inputs):
            what, digests[step.name] = "is done", receipts.read(step.name).digest
        elif known and (change := receipts.change(step, inputs)):
            what = f"was made otherwise: {change}"
        else:
            what = "is to be made"
        program = workflow.config.steps[step.name].run
        table.add_row(step.name, program, ", ".join(step.inputs), what, step.out)
    return table


def status_table(workflow: Workflow, receipts: Receipts, log_of: Callable[[str], Path]) -> Table:
    """How each step stands."""
    table = _steps("step", "", "time", "usd", "", "log")
    for name in workflow.steps:
        receipt = receipts.read(name)
        state, said = _state(receipt)
        log = log_of(name)
        table.add_row(
            name,
            Text(state, _COLOURS[state]),
            _duration(receipt.seconds) if receipt.seconds else "",
            f"{receipt.usd:.2f}" if receipt.usd else "",
            Text(said),
            str(log) if log.is_file() else "",
        )
    return table


def _state(receipt: Receipt) -> tuple[str, str]:
    """The state of a step that perhaps runs, and what is said of it."""
    if receipt.state == "open":
        return _WAITS, ""
    if receipt.state != "running":
        return receipt.state, receipt.said
    if receipt.maker is not None and receipt.maker.alive:
        return _RUNS, ""
    return _WAITS, "it was cut off; run it again"


def _steps(*columns: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("time", "left", "usd") else "left")
    return table


def _duration(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
