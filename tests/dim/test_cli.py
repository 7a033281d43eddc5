from __future__ import annotations

import errno
import inspect
import subprocess
import sys

import pytest
import typer

from dim import __version__, cli
from dim.errors import ConfigError, DesignerError, InputError
from dim.failures import explain, find_dim_error


def run(*arguments: str) -> int:
    return cli.execute(cli.root(), arguments, prog_name="dim")


def program(function, *arguments: str) -> int:
    return cli.execute(cli.command_of(function), arguments, prog_name="python -m job")


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def failing(error: BaseException):
    def main(count: int = 1) -> None:
        """Fail."""
        raise error

    return main


def test_version_and_help_import_nothing_heavy() -> None:
    code = (
        "import sys, contextlib, io\n"
        "from dim import cli\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out:\n"
        "    assert cli.execute(cli.root(), ['--version'], prog_name='dim') == 0\n"
        "    assert cli.execute(cli.root(), ['data', '--help'], prog_name='dim') == 0\n"
        "heavy = {'torch', 'ray', 'transformers', 'pyarrow', 'mlflow'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "print(out.getvalue())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert f"dim {__version__}" in done.stdout
    assert "ingest" in done.stdout and "export" in done.stdout


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for path in cli.COMMANDS:
        assert path.split()[0] in shown


@pytest.mark.parametrize("path", sorted(cli.COMMANDS))
def test_every_command_exists_and_documents_itself(
    path: str, capsys: pytest.CaptureFixture[str]
) -> None:
    function = cli.load(cli.COMMANDS[path][0])
    assert inspect.getdoc(function), f"{path} has no help text"
    assert run(*path.split(), "--help") == 0
    assert f"Usage: dim {path}" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(cli.COMMANDS))
def test_every_command_is_a_program_too(path: str) -> None:
    module = cli.COMMANDS[path][0].partition(":")[0]
    source = inspect.getsource(sys.modules.get(module) or __import__(module, fromlist=["main"]))
    assert 'if __name__ == "__main__":' in source


def test_without_arguments_the_help_is_shown_and_the_code_is_2(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run() == 2
    shown = capsys.readouterr()
    assert "Usage: dim" in shown.out + shown.err
    assert "error:" not in shown.err


def test_a_mistyped_command_is_one_line_with_a_suggestion(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("trian") == 2
    line = error_line(capsys)
    assert line.startswith("error: ") and "'train'" in line


def test_wrong_usage_names_the_option(capsys: pytest.CaptureFixture[str]) -> None:
    def main(count: int = typer.Option(..., help="How many.")) -> None:
        """Count."""

    assert program(main, "--count", "many") == 2
    assert "--count" in error_line(capsys)
    assert program(main) == 2
    assert "--count" in error_line(capsys)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (InputError("the image photo.png is truncated"), 1, "the image photo.png is truncated"),
        (ConfigError("a.yaml: unknown key 'stepz'"), 2, "a.yaml: unknown key 'stepz'"),
        (OSError(errno.ENOSPC, "No space left on device", "x.bin"), 1, "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "locked.bin"), 1, "permission denied"),
        (FileNotFoundError(errno.ENOENT, "No such file", "gone.png"), 1, "file not found: gone"),
        (ZeroDivisionError("division by zero"), 1, "unexpected ZeroDivisionError"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program(failing(error)) == code
    line = error_line(capsys)
    assert line.startswith("error: ") and said in line


def test_a_message_of_several_lines_becomes_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert program(failing(InputError("one\n  two\n\nthree"))) == 1
    assert error_line(capsys) == "error: one two three"


def test_debug_shows_the_traceback_and_still_the_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert program(failing(InputError("no image")), "--debug") == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.endswith("error: no image\n")
    monkeypatch.setenv("DIM_DEBUG", "1")
    assert program(failing(InputError("no image"))) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_program_runs_by_itself() -> None:
    code = (
        "import typer\nfrom dim.cli import run\nfrom dim.errors import InputError\n"
        "def main(name: str = typer.Argument(...)) -> None:\n"
        "    '''Greet.'''\n"
        "    if name == 'nobody': raise InputError('nobody is here')\n"
        "    print('hello', name)\n"
        "run(main)"
    )

    def call(name: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code, name], capture_output=True, text=True, timeout=60
        )

    good, bad = call("you"), call("nobody")
    assert (good.returncode, good.stdout) == (0, "hello you\n")
    assert (bad.returncode, bad.stderr) == (1, "error: nobody is here\n")


class FakeTaskError(Exception):
    """The shape of a remote task's error: its text is a traceback, its cause the real error."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("Traceback (most recent call last): ...")
        self.cause = cause

    def as_instanceof_cause(self) -> Exception:
        return self


def test_wrapped_errors_are_found() -> None:
    inner = DesignerError("the designer is unreachable")

    class TaskErrorOfItsCause(FakeTaskError, DesignerError):
        pass

    class WorkerGroupError(Exception):
        worker_failures = {0: FakeTaskError(inner)}

    chained = RuntimeError("outer")
    chained.__cause__ = inner
    for wrapped in (
        FakeTaskError(inner),
        TaskErrorOfItsCause(inner),
        FakeTaskError(FakeTaskError(inner)),
        WorkerGroupError(),
        chained,
        ExceptionGroup("several", [ValueError("x"), chained]),
    ):
        assert find_dim_error(wrapped) is inner
        assert explain(wrapped).sentence == "the designer is unreachable"
    assert find_dim_error(ValueError("x")) is None


def test_the_root_of_a_wrapped_bug_is_named() -> None:
    failure = explain(FakeTaskError(KeyError("width")))
    assert failure.sentence.startswith("unexpected KeyError: 'width'")


def test_a_part_that_is_not_installed_is_said_with_what_installs_it() -> None:
    with pytest.raises(ModuleNotFoundError) as raised:
        import no_such_library.part  # noqa: F401
    said = explain(raised.value)
    assert said.exit_code == 1
    assert said.sentence.startswith("no_such_library is not installed: install this package with")


def test_a_cycle_of_causes_ends() -> None:
    first, second = ValueError("a"), ValueError("b")
    first.__cause__, second.__cause__ = second, first
    assert find_dim_error(first) is None
    assert explain(first).exit_code == 1
