"""The one command ``dim``, and the same error handling for ``python -m`` programs.

A sub-command is imported when it is called and not before: ``dim --help`` and ``dim --version``
need neither torch nor Ray.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from dim import __version__
from dim.failures import INTERRUPTED, Failure, explain
from dim.redaction import redact

# name -> (module:function, what it does). A name of two words is a command within a group, or,
# where the first is a command itself, another one beside it.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("workflows.demo:main", "The whole loop on this machine, ending in a report page."),
    "run": ("workflows.run:main", "The steps of a workflow file that are not done."),
    "status": ("workflows.run:status", "How the steps of a workflow stand."),
    "data ingest": ("pipelines.ingest:main", "Edit pairs, images or tabletop into raw shards."),
    "data filter": ("pipelines.filter:main", "Raw pairs or images into fewer and better ones."),
    "data edit": ("pipelines.edit:main", "Raw pairs into DIM-Edit: filter, triage, blueprint."),
    "data t2i": ("pipelines.t2i:main", "Raw images into DIM-T2I: filter, long caption."),
    "data collect": (
        "serving.collect:main",
        "Edits that clients of a server accepted, as pairs to ingest.",
    ),
    "data inspect": (
        "pipelines.outputs.inspect:main",
        "A page to look at: samples, reasons, histograms.",
    ),
    "data features": (
        "pipelines.features:main",
        "Frozen hidden states and latents of DIM-Edit or DIM-T2I, to train on.",
    ),
    "data verify": ("pipelines.outputs.verify:main", "Check an output against its manifest."),
    "data card": ("pipelines.outputs.card:main", "The dataset card of an output: README.md."),
    "data export": (
        "pipelines.outputs.export:main",
        "DIM-Edit in its public layout, or WebDataset tars.",
    ),
    "train": ("training.train:main", "One training stage from a YAML file."),
    "runs": ("infra.runs:main", "List the runs that MLflow knows, or compare some."),
    "evaluate": (
        "pipelines.evaluate:main",
        "Edit accuracy of a model on held-out tabletop edits.",
    ),
    "serve": ("serving.serve:main", "Edits and generations over HTTP."),
    "serve rollout": ("serving.rollout:main", "A running server moves to another model."),
    "keys new": ("serving.keys:new", "An API key of the server, shown once, and its line to keep."),
    "batch": ("serving.batch:main", "Have a server do a file of requests, in OpenAI's layout."),
    "trace": (
        "workflows.trace:main",
        "From a painted image to its model, training run and data.",
    ),
    "edit": ("dim.commands.edit:main", "Edit one image."),
    "generate": ("dim.commands.generate:main", "Paint one image from a text."),
    "model import": (
        "dim.commands.model_import:main",
        "A published checkpoint as a DIM folder.",
    ),
    "model export": (
        "dim.commands.model_export:main",
        "A DIM folder in the published checkpoints' layout.",
    ),
    "model merge": (
        "dim.commands.model_merge:main",
        "LoRA adapters merged into a DIM folder.",
    ),
    "model info": ("dim.commands.model_info:main", "What a DIM folder holds."),
    "plan": ("workflows.scaling.command:main", "What the published size takes, stage by stage."),
    "experiment ablation": (
        "workflows.ablation:main",
        "Instruction, blueprint or noisy blueprint: what a painter makes of each.",
    ),
    "experiment rounds": (
        "workflows.rounds:main",
        "Rounds and the best of several: exact edits against the time that they take.",
    ),
    "doctor": ("infra.doctor:main", "Whether what a job needs is there, and what to do."),
    "submit": ("infra.submit:main", "Run a sub-command as a job on a Ray cluster."),
    "tiny build": ("workflows.tiny:main", "Pretrain the tiny models that ship with the package."),
    "tiny report": ("dim.tiny.report:main", "Measure the tiny models that ship with the package."),
}
GROUPS = {
    "keys": "API keys of `dim serve`.",
    "data": "Make DIM-T2I and DIM-Edit data sets.",
    "model": "Published checkpoints and model folders.",
    "experiment": "What is claimed, measured.",
    "tiny": "The tiny pretrained models of the package.",
}
MARKUP: Any = "rich"


class LazyGroup(TyperGroup):
    """A group that lists its commands from a table and imports one only to run it."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        """Swap the listed stand-in for the real command."""
        if (two := " ".join(args[:2])) in self.commands:
            args = [two, *args[2:]]
        name, command, rest = super().resolve_command(ctx, args)
        target = getattr(command, "target", None)
        if target is not None:
            command = command_of(load(target), name=name)
        return name, command, rest


class LazyCommand(TyperCommand):
    """What the help page shows of a command that is not imported yet."""

    def __init__(self, name: str, target: str, summary: str) -> None:
        super().__init__(name, help=summary, rich_markup_mode=MARKUP)
        self.target = target


def load(target: str) -> Callable[..., Any]:
    """The function behind ``module:function``."""
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


def command_of(function: Callable[..., Any], *, name: str | None = None) -> Any:
    """One typer-annotated function as a command object."""
    app = typer.Typer(add_completion=False, rich_markup_mode=MARKUP)
    app.command(name)(function)
    return typer.main.get_command(app)


def root() -> LazyGroup:
    """The command tree of ``COMMANDS``, with nothing imported."""
    group: LazyGroup = typer.main.get_command(_root_app())  # type: ignore[assignment]
    groups = {"": group}
    for path, (target, summary) in COMMANDS.items():
        parent, _, name = path.rpartition(" ")
        if parent in COMMANDS:
            parent, name = "", path
        if parent not in groups:
            groups[parent] = LazyGroup(
                name=parent, help=GROUPS[parent], no_args_is_help=True, rich_markup_mode=MARKUP
            )
            group.add_command(groups[parent], parent)
        groups[parent].add_command(LazyCommand(name, target, summary), name)
    return group


def _root_app() -> typer.Typer:
    app = typer.Typer(
        name="dim", cls=LazyGroup, no_args_is_help=True, add_completion=False,
        rich_markup_mode=MARKUP,
    )  # fmt: skip
    app.callback()(_root_options)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"dim {__version__}")
        raise typer.Exit


def _root_options(
    version: bool = typer.Option(
        False, "--version", is_eager=True, callback=_show_version, help="Show the version."
    ),
    debug: bool = typer.Option(
        False, "--debug", help="Show the traceback of an error (also: DIM_DEBUG=1, any position)."
    ),
) -> None:
    """Draw-In-Mind: a designer writes the edit down, a painter paints it."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console command ``dim``."""
    sys.exit(execute(root(), sys.argv[1:] if argv is None else argv, prog_name="dim"))


def run(function: Callable[..., Any], argv: Sequence[str] | None = None) -> None:
    """Run one typer-annotated function as a program: ``python -m pipelines.edit`` and the like."""
    module = getattr(sys.modules.get("__main__"), "__spec__", None)
    prog_name = f"python -m {module.name}" if module is not None else None
    arguments = sys.argv[1:] if argv is None else argv
    sys.exit(execute(command_of(function), arguments, prog_name=prog_name))


def execute(command: Any, argv: Sequence[str], *, prog_name: str | None) -> int:
    """Run ``command`` and return its exit code; an error becomes one line on stderr.

    0: done. 1: an error of input, storage, designer or the machine. 2: wrong usage or
    configuration. 130: interrupted.
    """
    arguments = [argument for argument in argv if argument != "--debug"]
    debug = len(arguments) < len(argv) or os.environ.get("DIM_DEBUG", "0") not in ("", "0")
    try:
        result = command.main(args=arguments, prog_name=prog_name, standalone_mode=False)
    except typer.TyperException as error:
        return _report(Failure(_usage_message(error), error.exit_code))
    except (typer.Abort, KeyboardInterrupt):
        return _report(Failure("interrupted", INTERRUPTED))
    except Exception as error:
        if debug:
            print(redact("".join(traceback.format_exception(error))), file=sys.stderr, end="")
        return _report(explain(error))
    if result == INTERRUPTED:
        return _report(Failure("interrupted", INTERRUPTED))
    return result if isinstance(result, int) else 0


def _usage_message(error: typer.TyperException) -> str:
    context = getattr(error, "ctx", None)
    message = " ".join(error.format_message().split())
    if not message or context is None:
        return message
    return f"{message.rstrip('.')} (see `{context.command_path} --help`)"


def _report(failure: Failure) -> int:
    # A group called with nothing has printed its help already and has no sentence.
    if failure.sentence:
        print(f"error: {redact(failure.sentence)}", file=sys.stderr, flush=True)
    return failure.exit_code


if __name__ == "__main__":
    main()
