"""``dim run`` and ``dim status``: a workflow's steps, each when what it takes is there."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from dim.config import suggestion
from dim.errors import ConfigError, DimError
from dim.failures import Failure
from infra import tracing
from infra.cost import NODES, NodeHours, counted_cost
from infra.storage import is_local, join, local_path
from infra.tracking import PARENT_RUN, Tracking
from pipelines.cluster import connect
from workflows.programs.program import Done
from workflows.receipts import BEAT_S, FOLDER, Receipt, Receipts, maker
from workflows.step_process import StepProcess, prepare
from workflows.view import View, plan_table, status_table
from workflows.workflow import Step, Workflow, load_workflow, programs_of

_LOOK_S = 0.5


class StepError(DimError):
    """A step could not be done."""


def run(workflow: Workflow, console: Console, *, begin_at: str | None = None) -> Receipts:
    """Bring every step to be done; what is done already is left as it is.

    Independent steps run side by side. When one fails, those that run are ended after it in good
    order and no other is begun; the same call goes on from there.

    Args:
        workflow: what is run.
        console: where it says so.
        begin_at: a step to make again, with all that follow from it.

    Raises:
        ConfigError: a finished step was made with other settings, or there is no ``begin_at``.
        StepError: a step failed, or another process is at work here.
    """
    receipts = Receipts(workflow)
    _refuse_company(workflow, receipts)
    if begin_at is not None:
        _open_again(workflow, receipts, begin_at)
    try:
        with _stopping_on_sigterm(), View(console, list(workflow.steps)) as view:
            _Run(workflow, receipts, view).to_the_end()
    except BaseException:
        for line in _what_goes_on(workflow, receipts):
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        raise
    return receipts


class _Run:
    """One call's work on a workflow: which steps are done, and which are being made."""

    def __init__(self, workflow: Workflow, receipts: Receipts, view: View) -> None:
        self._workflow = workflow
        self._receipts = receipts
        self._view = view
        self._digests: dict[str, str] = {}  # of the steps that are done
        self._at_work: dict[str, StepProcess] = {}
        self._begun: dict[str, float] = {}  # by time.monotonic
        self._beat = 0.0
        self._ray: str | None = None  # address of the Ray that the steps run on
        self._owns_ray = False
        self._parent: str | None = None
        self._cost = NodeHours()

    def to_the_end(self) -> None:
        self._find_done()
        if len(self._digests) == len(self._workflow.steps):
            return
        prepare(self._workflow.config.steps[name].run for name in self._open())
        try:
            self._work()
        finally:
            for process in self._at_work.values():
                process.stop()
                self._note(process.step.name, state="open")
            self._leave_ray()

    def _work(self) -> None:
        self._begin_what_can_be(stays=True)  # somebody waits for it, and it logs to no run
        tracking = self._workflow.tracking
        tracked = Tracking(str(tracking.uri), tracking.experiment)
        name = f"workflow {Path(self._workflow.config.out).name}"
        with (
            tracing.here().span(name, output=self._workflow.config.out),
            tracked.run(name, {"steps": list(self._workflow.steps)}) as parent,
            counted_cost(parent, tracking.prices) as self._cost,
        ):
            self._parent = parent.id
            while len(self._digests) < len(self._workflow.steps):
                self._begin_what_can_be()
                self._wait()

    def _find_done(self) -> None:
        for step in self._workflow.steps.values():
            if not all(name in self._digests for name in step.inputs):
                continue
            inputs = self._inputs(step)
            if self._receipts.is_done(step, inputs):
                receipt = self._receipts.read(step.name)
                self._digests[step.name] = receipt.digest
                self._view.done(step.name, receipt.said, receipt.seconds, receipt.usd, before=True)
            else:
                self._refuse_changed(step, inputs)

    def _refuse_changed(self, step: Step, inputs: Mapping[str, str]) -> None:
        if change := self._receipts.change(step, inputs):
            raise ConfigError(
                f"step {step.name!r} is done and was made otherwise ({change}): "
                f"`--from {step.name}` makes it again with all that follow from it; or choose "
                "another out"
            )

    def _begin_what_can_be(self, *, stays: bool = False) -> None:
        """Begin the steps that may be; with ``stays`` only servers, which stay."""
        for step in self._workflow.steps.values():
            if len(self._at_work) == self._workflow.config.parallel:
                return
            if stays and not step.program.stays:
                continue
            waits = not all(name in self._digests for name in step.inputs)
            if waits or step.name in self._digests or step.name in self._at_work:
                continue
            self._begin(step)

    def _begin(self, step: Step) -> None:
        inputs = self._inputs(step)
        self._refuse_changed(step, inputs)
        before = self._receipts.read(step.name)
        anew = before.anew
        if anew and step.program.clear is not None:
            step.program.clear(step.config, before.result)
            anew = False
        self._receipts.write(
            step.name,
            Receipt(
                state="running",
                anew=anew,
                settings=self._receipts.settings(step),
                inputs=inputs,
                maker=maker(),
            ),
        )
        process = StepProcess(
            step,
            self._workflow.config.steps[step.name].run,
            anew=anew,
            log=log_of(self._workflow, step.name),
            variables=self._variables(step),
        )
        self._at_work[step.name] = process
        self._begun[step.name] = time.monotonic()
        self._view.begin(step.name, process.log)

    def _variables(self, step: Step) -> dict[str, str]:
        if step.program.stays:
            return {}
        if self._ray is None:
            self._ray = self._find_ray()
        told = {"RAY_ADDRESS": self._ray, PARENT_RUN: str(self._parent)}
        return told | ({tracing.PARENT: trace} if (trace := tracing.here().parent) else {})

    def _wait(self) -> None:
        """Take what the steps say, for a moment at most."""
        by_connection = {each.connection: each for each in self._at_work.values()}
        for connection in wait(list(by_connection), timeout=_LOOK_S):
            process = by_connection[connection]  # type: ignore[index]
            said = process.take()
            if isinstance(said, Done):
                self._finish(process, said)
            elif isinstance(said, Failure):
                self._fail(process, said)
            else:
                self._view.tell(process.step.name, *said)
        if time.monotonic() - self._beat > BEAT_S:
            self._beat = time.monotonic()
            for name in self._at_work:
                self._note(name, maker=maker())
        self._view.refresh(self._cost.metrics(self._workflow.tracking.prices).get(NODES))

    def _finish(self, process: StepProcess, done: Done) -> None:
        step = process.step
        del self._at_work[step.name]
        process.stop()
        running = self._receipts.read(step.name)
        found = running.model_copy(update={"result": done.result})
        digest = self._receipts.digest(step, found)
        if digest is None:
            raise StepError(f"step {step.name!r} says that it is done, and its output is not there")
        seconds = time.monotonic() - self._begun[step.name]
        finished = {"state": "done", "anew": False, "digest": digest, "said": done.said,
                    "usd": done.usd, "seconds": seconds, "maker": None}  # fmt: skip
        self._receipts.write(step.name, found.model_copy(update=finished))
        self._digests[step.name] = digest
        self._cost.calls_usd += done.usd
        self._view.done(step.name, done.said, seconds, done.usd)
        if all(self._workflow.steps[each].program.stays for each in self._open()):
            self._leave_ray()  # what is left has its own

    def _fail(self, process: StepProcess, failed: Failure) -> None:
        name = process.step.name
        del self._at_work[name]
        process.stop()
        self._note(name, state="failed", said=failed.sentence, maker=None)
        self._view.failed(name, failed.sentence)
        error = StepError(f"step {name!r}: {failed.sentence} (log: {process.log})")
        error.exit_code = failed.exit_code
        raise error

    def _open(self) -> list[str]:
        return [name for name in self._workflow.steps if name not in self._digests]

    def _inputs(self, step: Step) -> dict[str, str]:
        return {name: self._digests[name] for name in step.inputs}

    def _note(self, name: str, **changes: object) -> None:
        receipt = self._receipts.read(name)
        self._receipts.write(name, receipt.model_copy(update=changes))

    def _find_ray(self) -> str:
        """Address of the Ray of all steps, which this process asks for its nodes: the cluster's,
        or one that is started here."""
        import ray

        self._owns_ray = connect()
        _stop_on_sigterm()  # again, because Ray sets its own handler
        logging.getLogger("ray").setLevel(logging.ERROR)
        return os.environ.get("RAY_ADDRESS") or str(ray.get_runtime_context().gcs_address)

    def _leave_ray(self) -> None:
        if self._owns_ray:
            import ray

            ray.shutdown()
        self._owns_ray, self._ray = False, None


def begin_imports(path: Path) -> None:
    """Have the steps' programs imported in the background: reading a workflow's settings takes the
    same seconds of imports in this process.

    Args:
        path: of the workflow's file. What is wrong with it is told when it is read.
    """
    with suppress(DimError):
        prepare(programs_of(path))


def _what_goes_on(workflow: Workflow, receipts: Receipts) -> Iterator[str]:
    """A line for each server that steps have started and that answers, for whoever stops here."""
    servers: dict[int, str] = {}
    with suppress(DimError):  # what stopped the run is what is to be told
        for name, step in workflow.steps.items():
            result = receipts.read(name).result
            if step.program.stays and step.program.digest(step.config, result) is not None:
                servers[result["pid"]] = result["url"]
    for pid, url in servers.items():
        yield f"{url}/ goes on; stop it with: kill {pid}"


def log_of(workflow: Workflow, name: str) -> Path:
    """Where a step's own words go: in the workflow's folder, beside the current one's if remote."""
    out = workflow.config.out
    folder = Path(local_path(out)) if is_local(out) else Path("runs") / Path(out).name
    return folder / FOLDER / f"{name}.log"


def _refuse_company(workflow: Workflow, receipts: Receipts) -> None:
    for name in workflow.steps:
        receipt = receipts.read(name)
        if receipt.state == "running" and receipt.maker is not None and receipt.maker.alive:
            by = receipt.maker
            raise StepError(
                f"{join(workflow.config.out, FOLDER)}: step {name!r} is being made by process "
                f"{by.pid} on {by.host}; wait for it, or end it"
            )


def _open_again(workflow: Workflow, receipts: Receipts, name: str) -> None:
    if name not in workflow.steps:
        raise ConfigError(f"--from {name}: no such step{suggestion(name, workflow.steps)}")
    for each in (name, *workflow.following(name)):
        receipts.write(each, Receipt(anew=True, result=receipts.read(each).result))


@contextmanager
def _stopping_on_sigterm() -> Iterator[None]:
    """SIGTERM inside ends the steps in good order, as Ctrl-C does."""
    before = _stop_on_sigterm()
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)


def _stop_on_sigterm() -> Any:
    """Returns what was done before; in a thread, nothing."""
    if threading.current_thread() is not threading.main_thread():
        return None
    return signal.signal(signal.SIGTERM, signal.default_int_handler)


WorkflowFile = Annotated[Path, typer.Argument(metavar="WORKFLOW.yaml", help="A file of steps.")]
Values = Annotated[
    list[str] | None,
    typer.Argument(help="Values of the file to change: NAME=VALUE, or key.sub=value."),
]


def main(
    workflow: WorkflowFile,
    overrides: Values = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what would be done, and start nothing.")
    ] = False,
    begin_at: Annotated[
        str | None, typer.Option("--from", metavar="STEP", help="Make it and what follows again.")
    ] = None,
) -> None:
    """Run a workflow: the steps of a file that are not done, side by side where they can be.

    Killed anywhere and run again, it goes on.
    """
    if not plan:
        begin_imports(workflow)
    loaded, console = load_workflow(workflow, overrides or []), Console()
    if plan:
        console.print(plan_table(loaded, Receipts(loaded), begin_at))
        return
    run(loaded, console, begin_at=begin_at)


def status(workflow: WorkflowFile, overrides: Values = None) -> None:
    """Say of each step of a workflow how it stands."""
    loaded = load_workflow(workflow, overrides or [])
    Console().print(status_table(loaded, Receipts(loaded), lambda name: log_of(loaded, name)))


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
