"""``dim demo``: raw edit pairs → shards → three training stages → evaluation → an HTTP server.

Every step is the command that a user would run by itself, on a local Ray, with a local folder as
the object store and MLflow on SQLite.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pyarrow.compute as pc
import ray
import typer
from pydantic import Field, PositiveInt
from rich.console import Console

from dim.config import CONFIGS, load_config
from dim.errors import DimError
from dim.model.config import ModelConfig
from infra.ports import free_port
from infra.tracking import Tracking
from pipelines import evaluate
from pipelines.cluster import connect
from pipelines.command import Overrides
from pipelines.job import TrackingConfig
from pipelines.outputs.manifest import Counts, Manifest
from pipelines.readers.tabletop import TabletopConfig
from pipelines.stages.paint import SELF
from serving.serve import check_port
from training import train
from training.progress import progress_bar
from training.stage import StageConfig
from workflows import tabletop
from workflows.report import Report

_TITLE = "Draw-In-Mind on a laptop"
_SERVER_STARTS_WITHIN = 180.0


class DemoConfig(TabletopConfig):
    """What the demo makes, from what, and where."""

    out: Path = Path("runs/demo")
    pairs: PositiveInt
    """Edit pairs to train on."""
    images: PositiveInt
    """Images for the text-to-image stage."""
    held_out: PositiveInt
    """Edits to measure on, of scenes that training never sees."""
    stages: tuple[str, ...]
    """Stage files in configs/, in order; each starts from the model of the one before."""
    stage_overrides: tuple[str, ...] = ()
    """key=value settings for every stage, on top of its file."""
    port: int | None = Field(None, ge=1, le=65535)
    """Of the server; a free one unless given."""


@dataclass(frozen=True)
class Places:
    """Where the demo keeps what it makes."""

    out: Path

    def data(self, name: str) -> str:
        """Folder of a data job's output."""
        return str(self.out / "data" / name)

    def stage(self, name: str) -> str:
        """Folder of a training stage."""
        return str(self.out / "training" / name)

    @property
    def tracking(self) -> str:
        """The MLflow store."""
        return f"sqlite:///{self.out / 'mlflow.db'}"

    @property
    def report(self) -> Path:
        """The report page."""
        return self.out / "report.html"


@dataclass(frozen=True)
class Trained:
    """The last stage's model, and every stage's closing metrics."""

    model: str
    checkpoint: str
    metrics: list[tuple[str, dict[str, float]]]


@dataclass(frozen=True)
class Background:
    """A server that goes on when the demo has ended."""

    pid: int
    url: str
    log: Path


def run(config: DemoConfig, console: Console) -> Path:
    """Run the whole loop and leave a server running; returns the report page.

    What an earlier, interrupted demo finished in the same folder is not done again.

    Raises:
        DimError: a step could not be done; the message says which and why.
    """
    places = Places(config.out.resolve())
    if config.port is not None:
        check_port("127.0.0.1", config.port)
    started = time.monotonic()
    connect()
    try:
        jobs = make_data(config, places, console)
        trained = train_stages(config, places, console)
        evaluation = measure(places, trained.model, console)
    finally:
        ray.shutdown()
    server = serve(config, places, trained.model, console)
    example, said = choose_example(evaluation)
    curl = example_request(places, server, example)
    lines = list_places(places, trained, server)
    report = Report(
        title=_TITLE,
        intro=_introduction(config, evaluation, time.monotonic() - started),
        evaluation=evaluation,
        jobs=[(name, manifest.counts) for name, manifest in jobs],
        stages=trained.metrics,
        places=lines,
        curl=curl,
        example=said,
    )
    places.report.write_text(report.render(), encoding="utf-8")
    console.print(evaluate.table(evaluation))
    for name, where in lines:
        console.print(f"[bold]{name:<12}[/bold] {where}", soft_wrap=True, highlight=False)
    console.print(f"\nEdit an image with the running server ({said}):\n", highlight=False)
    console.print(curl, soft_wrap=True, highlight=False, markup=False)
    console.print(f"\nOr open this page: {server.url}/", soft_wrap=True, highlight=False)
    return places.report


def make_data(config: DemoConfig, places: Places, console: Console) -> list[tuple[str, Manifest]]:
    """Tabletop → raw shards → DIM-T2I, DIM-Edit and held-out DIM-Edit shards."""
    tracking = TrackingConfig(uri=places.tracking, experiment="dim-data")
    raw, images, held_out = (places.data(f"raw-{n}") for n in ("edit", "t2i", "held-out"))
    seed = config.seed

    def design(raw: str, out: str) -> Manifest:
        return tabletop.designed(config, raw, places.data(out), tracking, designer="oracle")

    steps: list[tuple[str, Callable[[], Manifest]]] = [
        (
            "ingest pairs",
            lambda: tabletop.raw_pairs(config, raw, config.pairs, tracking, seed=seed),
        ),
        (
            "ingest held-out pairs",
            lambda: tabletop.raw_pairs(config, held_out, config.held_out, tracking, seed=seed + 1),
        ),
        (
            "ingest images",
            lambda: tabletop.raw_images(config, images, config.images, tracking, seed=seed + 2),
        ),
        ("DIM-Edit", lambda: design(raw, "edit")),
        ("held-out DIM-Edit", lambda: design(held_out, "held-out")),
        ("DIM-T2I", lambda: tabletop.captioned(config, images, places.data("t2i"), tracking)),
    ]
    done = []
    for name, step in steps:
        with console.status(f"data: {name}"):
            manifest = step()
        console.print(f"data: {name}: {_counted(manifest.counts)}", highlight=False)
        done.append((name, manifest))
    return done


def train_stages(config: DemoConfig, places: Places, console: Console) -> Trained:
    """The stages in order, each from the model of the one before."""
    init: str | None = None
    metrics: list[tuple[str, dict[str, float]]] = []
    for file in config.stages:
        stage = stage_config(config, file, places, init)
        with progress_bar(console, f"train: {stage.stage}") as on_progress:
            result = train.run(stage, on_progress=on_progress)
        metrics.append((stage.stage, result.metrics))
        init = result.model_dir
    return Trained(init or "", result.checkpoint, metrics)


def stage_config(config: DemoConfig, file: str, places: Places, init: str | None) -> StageConfig:
    """A stage file of configs/ with the demo's own places."""
    path = CONFIGS / file
    name = load_config(StageConfig, path).stage
    data = places.data("t2i" if name == "t2i" else "edit")
    overrides = [
        f"data={json.dumps([data])}",
        f"out={json.dumps(places.stage(name))}",
        f"init={json.dumps(init or str(CONFIGS / 'tiny.yaml'))}",
        f"tracking.uri={json.dumps(places.tracking)}",
    ]
    if load_config(StageConfig, path).validation is not None:
        overrides.append(f"validation.data={json.dumps([places.data('held-out')])}")
    return load_config(StageConfig, path, [*overrides, *config.stage_overrides])


def measure(places: Places, model: str, console: Console) -> evaluate.Evaluation:
    """Paint the held-out edits from the oracle's, the model's own and no blueprints; log it."""
    with console.status("evaluate: held-out edits"):
        evaluation = evaluate.run(
            evaluate.EvaluateConfig(model=model, data=places.data("held-out"))
        )
    with Tracking(places.tracking, "dim-evaluation").run("demo", {"model": model}) as tracked:
        tracked.log_metrics(evaluation.metrics())
    return evaluation


def serve(config: DemoConfig, places: Places, model: str, console: Console) -> Background:
    """Start ``dim serve`` as a process of its own and wait until it answers."""
    port = config.port or free_port()
    command = [sys.executable, "-m", "serving.serve", "--model", model, "--port", str(port)]
    command += ["--designer", "self", "--designer", "oracle"]
    log = places.out / "server.log"
    with console.status("serve: starting"), log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=CONFIGS.parent,
        )
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_for(f"{url}/healthz", process, log)
        except BaseException:  # also when the user gives up: no server is left that nobody named
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            raise
    return Background(process.pid, url, log)


def choose_example(evaluation: evaluate.Evaluation) -> tuple[dict[str, Any], str]:
    """A held-out edit to try by hand, and what to know of it.

    One that comes out right, if there is one: it is there to show what the server does, and how
    often that succeeds is said beside it.
    """
    rows = evaluation.painted.filter((pc.field("way") == SELF) & ~pc.field("referential"))
    right = rows.filter(pc.field("exact") & pc.field("designed_right"))
    share = evaluation.share(SELF, referential=False).accuracy
    said = f"with a blueprint of its own, {share:.0%} of direct edits come out exactly"
    if right.num_rows:
        return right.slice(0, 1).to_pylist()[0], f"{said}; this one did"
    return evaluation.painted.slice(0, 1).to_pylist()[0], said


def example_request(places: Places, server: Background, example: Mapping[str, Any]) -> str:
    """Write an example image; the ``curl`` that edits it against the running server."""
    image, edited = places.out / "example.png", places.out / "example-edited.png"
    image.write_bytes(example["source"])
    decode = (
        'import base64,json,sys; d=json.load(sys.stdin)["data"][0]; print(d["blueprint"]); '
        f'open({str(edited)!r},"wb").write(base64.b64decode(d["b64_json"]))'
    )
    return (
        f"curl -s {server.url}/v1/images/edits -F image=@{shlex.quote(str(image))} "
        f"-F prompt={shlex.quote(example['instruction'])} "
        f"| {shlex.quote(sys.executable)} -c {shlex.quote(decode)}"
    )


def list_places(places: Places, trained: Trained, server: Background) -> list[tuple[str, str]]:
    """Names and places, for the terminal and the report."""
    mlflow = Path(sys.executable).with_name("mlflow")
    return [
        ("shards", places.data("edit")),
        ("MLflow UI", f"{mlflow} ui --backend-store-uri {places.tracking}"),
        ("checkpoint", trained.checkpoint),
        ("model", trained.model),
        ("report", str(places.report)),
        ("server", f"{server.url} (log: {server.log}; stop it with: kill {server.pid})"),
    ]


def main(
    overrides: Overrides = None,
    config: Annotated[Path, typer.Option(help="Settings of the demo.")] = CONFIGS / "demo.yaml",
    out: Annotated[Path | None, typer.Option(help="Folder for everything it makes.")] = None,
) -> None:
    """The whole loop on this machine: data, three training stages, evaluation, HTTP server.

    No GPU, no account and no download is needed. Run again, it goes on where it was interrupted.
    """
    given = [] if out is None else [f"out={json.dumps(str(out))}"]
    run(load_config(DemoConfig, config, [*given, *(overrides or [])]), Console())


def _counted(counts: Counts) -> str:
    text = f"{counts.kept:,} of {counts.input:,} kept"
    if counts.rejected:
        reasons = ", ".join(f"{rows:,} {reason}" for reason, rows in counts.by_reason.items())
        text += f", {counts.rejected:,} rejected ({reasons})"
    return f"{text}, {counts.failed:,} failed"


def _introduction(config: DemoConfig, evaluation: evaluate.Evaluation, seconds: float) -> str:
    return (
        f"{config.pairs:,} edit pairs of a procedural tabletop became DIM-Edit shards with an "
        f"oracle's blueprints; connector and painter were trained through "
        f"{len(config.stages)} stages on this machine and measured on {config.held_out:,} edits of "
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


def _wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _SERVER_STARTS_WITHIN
    while time.monotonic() < deadline:
        if process.poll() is not None:
            last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            raise DimError(f"the server ended at once: {' '.join(last) or f'see {log}'}")
        try:
            with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310, our own server
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise DimError(f"the server did not answer within {_SERVER_STARTS_WITHIN:.0f} s; see {log}")


if __name__ == "__main__":
    from dim.cli import run as run_command

    run_command(main)
