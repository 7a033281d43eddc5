"""Every command of README and docs is one that there is, with options that it has."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from dim.cli import COMMANDS, command_of, load
from dim.config import StrictModel, shipped
from docs.generate.settings import PROGRAMS, all_models
from tests.docs.fences import NEEDS, PAGES, ROOT, Command, blocks, inline

PLACEHOLDERS = {"key", "key.sub"}
TOOLS = {"build"}
"""Programs that a page has its reader install first."""
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


@cache
def models() -> dict[str, list[type[StrictModel]]]:
    """The settings that a command takes as key=value, by the command's name."""
    known: dict[str, list[type[StrictModel]]] = {}
    for model in all_models():
        if found := re.match(r"`dim ([a-z0-9 ]+)`", PROGRAMS.get(model.__name__, "")):
            known.setdefault(found[1], []).append(model)
    return known


def plain(word: str) -> str:
    """A word of a command without the brackets by which a synopsis says that it may be left out."""
    bare = word.removesuffix("...")
    if word.startswith("[") and not word.startswith("[["):
        bare = bare[1:]
    return bare.rstrip("]") if "[" not in bare.partition("=")[2] else bare


def of_dim(words: tuple[str, ...]) -> tuple[str, list[str]] | None:
    """The name of a ``dim`` command, however it is started, and its arguments; None: no command."""
    if words[0] == "dim":
        for count in (2, 1):
            if (name := " ".join(words[1 : 1 + count])) in COMMANDS:
                return name, [plain(word) for word in words[1 + count :]]
        return None
    if words[:2] == ("python", "-m"):
        for name, (target, _) in COMMANDS.items():
            if target.partition(":")[0] == words[2]:
                return name, [plain(word) for word in words[3:]]
    return None


def inner(name: str, arguments: list[str]) -> list[str] | None:
    """The command that a cluster is told to run, behind ``--``."""
    if name != "submit" or "--" not in arguments:
        return None
    return arguments[arguments.index("--") + 1 :]


def parse(command: Command) -> None:
    """Have the command line itself read a command, and nothing done.

    Raises:
        AssertionError: it does not take it; the message says what and where.
    """
    if command.words[-1] in ("--help", "--version"):
        return  # which end the parsing; they are executed
    found = of_dim(command.words)
    assert found is not None, f"{command}: no such command"
    name, arguments = found
    if (task := inner(name, arguments)) is not None:
        parse(Command(("dim", *task), command.where))
    try:
        context = command_of(load(COMMANDS[name][0]), name=name).make_context(name, arguments)
    except typer.TyperException as error:
        raise AssertionError(f"{command}: {error.format_message()}") from None
    check_overrides(command, name, overrides(context.params))
    check_files(command)


def overrides(parameters: dict[str, Any]) -> list[str]:
    """The key=value arguments among what was parsed."""
    return [text for text in parameters.get("overrides") or [] if re.match(r"[a-z][\w.]*=", text)]


def check_overrides(command: Command, name: str, given: list[str]) -> None:
    """Each key is a setting of the command."""
    known = models().get(name, [])
    for text in given if known and name != "run" else []:
        key = text.partition("=")[0]
        assert key in PLACEHOLDERS or any(has(model, key.split(".")) for model in known), (
            f"{command}: no setting {key}"
        )


def has(annotation: Any, path: list[str]) -> bool:
    """Whether a setting's type has what ``path`` leads to."""
    if not path:
        return True
    if isinstance(annotation, type) and issubclass(annotation, StrictModel):
        field = annotation.model_fields.get(path[0])
        return field is not None and has(field.annotation, path[1:])
    arguments = getattr(annotation, "__args__", ())
    if getattr(annotation, "__origin__", None) is dict:
        return has(arguments[1], path[1:])
    return annotation is Any or any(has(argument, path) for argument in arguments)


def check_files(command: Command) -> None:
    """Each file of ``configs/`` is there."""
    for word in command.words:
        for name in re.findall(r"(?<![\w/])configs/[\w.-]+\.yaml", word):
            assert Path(shipped(name)).is_file() or (ROOT / name).is_file(), f"{command}: no {name}"


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_is_parsed_by_its_program(page: Path) -> None:
    for block in blocks(page):
        for command in block.commands() if block.is_shell else ():
            match command.words:
                case ("dim", *_):
                    parse(command)
                case ("python", "-m", module, *_):
                    assert module in TOOLS or importlib.util.find_spec(module), (
                        f"{command}: no module"
                    )
                    if of_dim(command.words):
                        parse(command)
                case ("make", target, *_):
                    assert target in make_targets(), f"{command}: no target"
                case ("ray", "job", "submit", *words) if "--" in words:
                    parse(Command(tuple(words[words.index("--") + 1 :]), command.where))


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_command_in_a_sentence_exists(page: Path) -> None:
    for command in inline(page):
        match command.words:
            case ("make", target, *_):
                assert target in make_targets() or "=" in target, f"{command}: no target"
            case ("python", "-m", module, *_):
                assert module in TOOLS or importlib.util.find_spec(module), f"{command}: no module"
            case ("dim", *words) if words and re.fullmatch(r"[a-z0-9]+", words[0]):
                check_mentioned(command)
        check_files(command)


def check_mentioned(command: Command) -> None:
    """The command is there, or a group of commands, and has the options that are named."""
    found = of_dim(command.words)
    if found is None:
        group = command.words[1]
        assert any(name.startswith(f"{group} ") for name in COMMANDS), f"{command}: no command"
        return
    name, arguments = found
    options = {
        option
        for parameter in command_of(load(COMMANDS[name][0]), name=name).params
        for option in (*parameter.opts, *parameter.secondary_opts)
    } | {"--help", "--debug", "--"}
    before = arguments[: arguments.index("--")] if "--" in arguments else arguments
    for word in before:
        if word.startswith("--"):
            assert word.partition("=")[0].rstrip(",;") in options, f"{command}: no option {word}"


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_marks_are_of_the_known_ones(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    marked = [block for block in blocks(page) if block.needs]
    marks = re.findall(r"^<!-- needs:", text, re.MULTILINE)
    assert len(marked) == len(marks), f"{page}: a mark stands above no block"
    for block in marked:
        assert block.needs <= NEEDS, f"{block.where}: {sorted(block.needs - NEEDS)}"
        assert block.is_shell, f"{block.where}: only commands need something"


def test_a_renamed_option_is_found() -> None:
    wrong = {
        "dim data edit --raw a --desinger oracle --out b": "desinger",
        "dim data edit --raw a --designer oracle --out b filters.min_sides=3": "filters.min_sides",
        "dim train configs/tiny-edit9.yaml": "tiny-edit9",
        "dim data edits --raw a": "no such command",
        "dim submit -- data edit --raw a --outs b": "outs",
    }
    for text, said in wrong.items():
        with pytest.raises(AssertionError, match=re.escape(said)):
            parse(Command(tuple(text.split()), "here"))
    parse(Command(tuple(["dim", "train", "STAGE.yaml", "[key=value", "...]"]), "here"))
    with pytest.raises(AssertionError, match="model2"):
        check_mentioned(Command(("dim", "evaluate", "--model2"), "here"))
