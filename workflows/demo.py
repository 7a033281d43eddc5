"""``dim demo``: a workflow from raw edit pairs to an HTTP server, and a page about what came out.

Every step is the command that a user would run by itself, on a local Ray, with a local folder as
the object store and MLflow on SQLite.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import pyarrow.compute as pc
import typer
from rich.console import Console

from dim.config import CONFIGS, load_config
from dim.model.config import ModelConfig
from infra.storage import open_store
from pipelines.command import Overrides
from pipelines.outputs.manifest import open_finished
from workflows.receipts import Receipts
from workflows.run import begin_imports
from workflows.run import run as run_workflow
from workflows.workflow import Workflow, load_workflow, place

if TYPE_CHECKING:
    from pipelines.evaluate import Evaluation

_TITLE = "Draw-In-Mind on a laptop"
_JOBS = {
    "raw-pairs": "ingest pairs",
    "raw-held-out": "ingest held-out pairs",
    "raw-images": "ingest images",
    "pairs": "DIM-Edit",
    "held-out": "held-out DIM-Edit",
    "images": "DIM-T2I",
}
_STAGES = ("t2i", "edit1", "edit2")


def run(workflow: Workflow, console: Console) -> Path:
    """Run the whole loop and leave a server running; returns the report page.

    What an earlier, interrupted demo finished in the same folder is not done again.

    Raises:
        DimError: a step could not be done; the message says which and why.
    """
    # Not at the top: the models come with them, and the steps' processes import those meanwhile.
    from pipelines import evaluate
    from workflows.report import Report

    started = time.monotonic()
    receipts = run_workflow(workflow, console)
    seconds = time.monotonic() - started
    evaluation = evaluate.read_written(place(workflow.config, "evaluate"))
    out, url = Path(workflow.config.out), receipts.read("serve").result["url"]
    example, said = choose_example(evaluation)
    curl = example_request(out, url, example)
    lines = list_places(workflow, receipts)
    report = Report(
        title=_TITLE,
        intro=_introduction(workflow, seconds),
        evaluation=evaluation,
        jobs=[
            (said_as, open_finished(place(workflow.config, name))[1].counts)
            for name, said_as in _JOBS.items()
        ],
        stages=[(name, receipts.read(name).result["metrics"]) for name in _STAGES],
        places=lines,
        curl=curl,
        example=said,
    )
    page = out / "report.html"
    open_store(str(out)).write(page.name, report.render().encode())
    console.print(evaluate.table(evaluation))
    for name, where in lines:
        console.print(f"[bold]{name:<12}[/bold] {where}", soft_wrap=True, highlight=False)
    console.print(f"\nEdit an image with the running server ({said}):\n", highlight=False)
    console.print(curl, soft_wrap=True, highlight=False, markup=False)
    console.print(f"\nOr open this page: {url}/", soft_wrap=True, highlight=False)
    return page


def choose_example(evaluation: Evaluation) -> tuple[dict[str, Any], str]:
    """A held-out edit to try by hand, and what to know of it.

    One that comes out right, if there is one: it is there to show what the server does, and how
    often that succeeds is said beside it.
    """
    from pipelines.stages.paint import SELF

    rows = evaluation.painted.filter((pc.field("way") == SELF) & ~pc.field("referential"))
    right = rows.filter(pc.field("exact") & pc.field("designed_right"))
    share = evaluation.share(SELF, referential=False).accuracy
    said = f"with a blueprint of its own, {share:.0%} of direct edits come out exactly"
    if right.num_rows:
        return right.slice(0, 1).to_pylist()[0], f"{said}; this one did"
    return evaluation.painted.slice(0, 1).to_pylist()[0], said


def example_request(out: Path, url: str, example: Mapping[str, Any]) -> str:
    """Write an example image; the ``curl`` that edits it against the running server."""
    image, edited = out / "example.png", out / "example-edited.png"
    image.write_bytes(example["source"])
    decode = (
        'import base64,json,sys; d=json.load(sys.stdin)["data"][0]; print(d["blueprint"]); '
        f'open({str(edited)!r},"wb").write(base64.b64decode(d["b64_json"]))'
    )
    return (
        f"curl -s {url}/v1/images/edits -F image=@{shlex.quote(str(image))} "
        f"-F prompt={shlex.quote(example['instruction'])} "
        f"| {shlex.quote(sys.executable)} -c {shlex.quote(decode)}"
    )


def list_places(workflow: Workflow, receipts: Receipts) -> list[tuple[str, str]]:
    """Names and places, for the terminal and the report."""
    mlflow = Path(sys.executable).with_name("mlflow")
    last, server = receipts.read(_STAGES[-1]).result, receipts.read("page").result
    return [
        ("shards", place(workflow.config, "pairs")),
        ("MLflow UI", f"{mlflow} ui --backend-store-uri {workflow.tracking.uri}"),
        ("checkpoint", last["checkpoint"]),
        ("model", last["model"]),
        ("report", str(Path(workflow.config.out) / "report.html")),
        (
            "server",
            f"{server['url']} (log: {server['log']}; stop it with: kill {server['pid']})",
        ),
    ]


def main(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="The demo's workflow.")] = CONFIGS / "demo.yaml",
    out: Annotated[Path | None, typer.Option(help="Folder for everything it makes.")] = None,
) -> None:
    """The whole loop on this machine: data, three training stages, evaluation, HTTP server.

    No GPU, no account and no download is needed. Run again, it goes on where it was interrupted.
    """
    begin_imports(config)
    given = [] if out is None else [f"out={json.dumps(str(out))}"]
    run(load_workflow(config, [*given, *(overrides or [])]), Console())


def _introduction(workflow: Workflow, seconds: float) -> str:
    values = workflow.config.values
    return (
        f"{values['pairs']:,} edit pairs of a procedural tabletop became DIM-Edit shards with an "
        f"oracle's blueprints; connector and painter were trained through "
        f"{len(_STAGES)} stages on this machine and measured on {values['held_out']:,} edits of "
        f"scenes they never saw. Everything took {seconds / 60:.1f} minutes. "
        f"{_start_of_painter()} The understanding model and the autoencoder are the tiny ones "
        "that ship with the package, pretrained on the tabletop; they stay frozen."
    )


def _start_of_painter() -> str:
    if load_config(ModelConfig, CONFIGS / "tiny.yaml").painter.weights is None:
        return "Connector and painter started from random weights."
    return (
        "Connector and painter started from the tiny text-to-image weights that ship with the "
        "package, as DIM-4.6B starts from SANA1.5."
    )


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
