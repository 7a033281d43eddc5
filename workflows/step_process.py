"""A step of a workflow in a process of its own, which ends with the workflow's."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from dim.failures import Failure, explain
from workflows import programs
from workflows.programs.program import Done
from workflows.workflow import Step

_ENDS_WITHIN_S = 60.0
_CONTEXT = multiprocessing.get_context("forkserver")


@dataclass(frozen=True)
class Task:
    """What a process is told: settings as JSON, since it reads them anew."""

    program: str
    config: dict[str, Any]
    out: str
    anew: bool
    log: Path
    variables: Mapping[str, str]


def prepare(names: Iterable[str]) -> None:
    """Start the process that the steps' are forked from, and let it import what they run.

    Args:
        names: of the programs.
    """
    _CONTEXT.set_forkserver_preload(sorted({programs.module_of(name) for name in names}))
    forkserver.ensure_running()


class StepProcess:
    """A step that is being made.

    Args:
        step: which.
        program: its name among the programs.
        anew: replace what is there.
        log: where all that it says goes.
        variables: of its environment, on top of this process's.
    """

    def __init__(
        self, step: Step, program: str, *, anew: bool, log: Path, variables: Mapping[str, str]
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        config = step.config.model_dump(mode="json", by_alias=True, exclude_unset=True)
        task = Task(program, config, step.out, anew, log, variables)
        self.step, self.log = step, log
        self.connection, theirs = _CONTEXT.Pipe(duplex=False)
        self._process: ForkServerProcess = _CONTEXT.Process(
            target=_run, args=(task, theirs), name=f"step {step.name}"
        )
        self._process.start()
        theirs.close()

    def take(self) -> tuple[float | None, str, float] | Done | Failure:
        """What it says next (as :class:`Tell` takes it); how it ended is the last."""
        try:
            said: tuple[float | None, str, float] | Done | Failure = self.connection.recv()
        except EOFError:
            self._process.join()
            return Failure(f"its process was killed (exit status {self._process.exitcode})", 1)
        return said

    def stop(self) -> None:
        """End it as Ctrl-C would; kill it where that does not help."""
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, signal.SIGINT)
        self._process.join(_ENDS_WITHIN_S)
        self._process.kill()
        self._process.join()


def _run(task: Task, connection: Connection) -> None:
    os.setsid()  # a Ctrl-C at the terminal is for the workflow, which then ends its steps
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(task.variables)
    with task.log.open("a", encoding="utf-8") as log:
        sys.stdout.flush()
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
    try:
        program = programs.program(task.program)
        config = program.config.model_validate(task.config)
        connection.send(
            program.run(
                config,
                task.out,
                task.anew,
                lambda share, said, usd=0.0: connection.send((share, said, usd)),
            )
        )
    except BaseException as error:
        failure = explain(error)
        print(failure.sentence, file=sys.stderr, flush=True)
        connection.send(failure)
        if not isinstance(error, Exception):
            raise SystemExit(failure.exit_code) from None
        if failure.sentence.startswith("unexpected"):
            raise  # its traceback belongs into the log


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
