"""``dim submit``: the same sub-command, run as a job on a Ray cluster."""

from __future__ import annotations

import asyncio
import os
import shlex
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import typer

from dim.cli import COMMANDS
from dim.errors import DimError, InputError
from dim.redaction import redact

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

NOT_UPLOADED = [".git", ".venv", "*.egg-info", "mlruns", "mlflow.db"]
PATIENCE_S = 180.0
"""With a cluster that has no agent yet to take a job, or does not answer while one is followed."""
_LOOK_S = 30.0  # between two looks at a job whose log is silent
_LAST_WORDS_S = 5.0  # of a job that has ended
_AGAIN_S = 1.0  # before another try to reach the cluster
_LOG_AGAIN = ", last available logs"  # after which Ray repeats the log, which has been printed
_LEFT_BY_RAY = "~/.ray/auth_token"


def main(
    command: list[str] | None = typer.Argument(
        None, metavar="-- COMMAND...", help="A sub-command with its arguments: train STAGE.yaml …"
    ),
    address: str | None = typer.Option(
        None, envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard, http://HOST:8265."
    ),
    working_dir: Path = typer.Option(
        Path("."), help="Uploaded to the cluster: this project with its configuration files."
    ),
    wait: bool = typer.Option(
        True, help="Follow the job's log and end as it ends, with its exit code."
    ),
    attach: str | None = typer.Option(
        None, metavar="JOB", help="Follow a job that was submitted before, instead of another one."
    ),
) -> None:
    """Run a sub-command as a job on a Ray cluster.

    The cluster runs `python -m …` in a copy of the working directory, so a job is the same program
    as on this machine. Paths of data and models must mean something there: URIs, not local files.
    Ctrl-C leaves the job running; --attach follows it again.
    """
    if (attach is None) == (not command):
        raise InputError("give either a command to submit, or --attach JOB to follow one")
    if attach is not None and not wait:
        raise InputError("--attach follows a job, and --no-wait is not to: leave one of them out")
    entrypoint = "" if attach else entrypoint_of(command or ())
    client = connect(address or "http://127.0.0.1:8265")
    if attach is not None:
        follow(client, attach)
        return
    job = submit(client, entrypoint, working_dir)
    typer.echo(f"submitted {job}: {redact(entrypoint)}", err=True)
    if wait:
        follow(client, job)


def entrypoint_of(command: Sequence[str]) -> str:
    """``["data", "edit", "--raw", "s3://x"]`` → ``"python -m pipelines.edit --raw s3://x"``.

    Raises:
        InputError: no such sub-command, or one that makes no sense as a job.
    """
    for words in (2, 1):
        name = " ".join(command[:words])
        if name in COMMANDS and name != "submit":
            module = COMMANDS[name][0].partition(":")[0]
            return shlex.join(["python", "-m", module, *command[words:]])
    known = ", ".join(name for name in COMMANDS if name != "submit")
    raise InputError(f"cannot submit {' '.join(command[:2])!r}; sub-commands are: {known}")


def connect(address: str) -> JobSubmissionClient:
    """A client of the cluster's job server, with the cluster's token if it asks for one.

    Ray's own client sends the token only where ``RAY_AUTH_MODE`` is ``token``, and a cluster that
    was started by ``ray start`` where a token lay asks for it whatever that says.

    Raises:
        DimError: nothing answers at ``address``, or it does not let us in.
    """
    from ray.exceptions import AuthenticationError

    token = None
    if os.environ.get("RAY_AUTH_MODE", "").lower() == "token":
        token = _token()  # Ray itself ends the process where it cannot be read
    with suppress(AuthenticationError):
        return _client(address, token)
    token = token or _token()
    if token is None:
        raise DimError(
            f"the cluster at {address} wants its token, and there is none here: put it into "
            "RAY_AUTH_TOKEN, the name of its file into RAY_AUTH_TOKEN_PATH, or the file to "
            f"{_LEFT_BY_RAY} (`ray get-auth-token` on the head shows it); "
            "`ray job submit` needs RAY_AUTH_MODE=token besides"
        )
    with suppress(AuthenticationError):
        return _client(address, token)
    raise DimError(
        f"the cluster at {address} has another token than the one in {token.source}: take that of "
        "its head, which `ray get-auth-token` shows there"
    )


class JobFailed(DimError):
    """A job did not end well. ``exit_code`` is that of its program, where it came to have one."""

    def __init__(self, message: str, exit_code: int | None) -> None:
        super().__init__(message)
        self.exit_code = exit_code or DimError.exit_code


class _Token(NamedTuple):
    """A cluster's token, and where it was found."""

    value: str
    source: str


def _token() -> _Token | None:
    """The token that Ray would take: of a variable, of the file that one names, of the home folder.

    Raises:
        DimError: the file that is named cannot be read, or is empty.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return _Token(value, "RAY_AUTH_TOKEN")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named or _LEFT_BY_RAY).expanduser()
    try:
        value = path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        if not named:
            return None
        raise DimError(f"RAY_AUTH_TOKEN_PATH: there is no file {path}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DimError(f"the token of the cluster cannot be read: {error}") from None
    if not value:
        raise DimError(f"{path} is to hold the token of the cluster and is empty")
    return _Token(value, str(path))


def _client(address: str, token: _Token | None) -> JobSubmissionClient:
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    headers = {"Authorization": f"Bearer {token.value}"} if token else None
    try:
        return JobSubmissionClient(address, headers=headers)
    except AuthenticationError:
        raise
    except (ConnectionError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
        raise DimError(f"no Ray cluster answers at {address}: {first_line}") from None


def submit(client: JobSubmissionClient, entrypoint: str, working_dir: Path) -> str:
    """Upload ``working_dir``, start ``entrypoint`` in it and return the job's id.

    A cluster that has just come up has no agent to take jobs for some seconds; it is waited for.

    Raises:
        DimError: the folder cannot be uploaded or the cluster refuses the job.
    """
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.submit_job(
                entrypoint=entrypoint,
                runtime_env={"working_dir": str(working_dir), "excludes": NOT_UPLOADED},
            )
        except (RuntimeError, ValueError) as error:
            if "No available agent" in str(error) and time.monotonic() < deadline:
                time.sleep(1)
                continue
            raise DimError(f"the job was not taken: {' '.join(str(error).split())}") from None


def follow(client: JobSubmissionClient, job: str) -> None:
    """Print the log of ``job`` until it ends, whatever becomes of the connection meanwhile.

    Raises:
        JobFailed: the job failed or was stopped.
        DimError: the cluster knows no such job, or did not answer for ``PATIENCE_S``.
    """
    try:
        info = asyncio.run(_print_log(client, job))
    except KeyboardInterrupt:
        typer.echo(
            f"{job} goes on; `dim submit --attach {job}` follows it again, `ray job stop {job}` "
            "ends it",
            err=True,
        )
        raise
    if info.status != "SUCCEEDED":
        message = (info.message or "no message").partition(_LOG_AGAIN)[0]
        said = " ".join(message.split())
        raise JobFailed(f"job {job} {info.status.lower()}: {said}", info.driver_exit_code)


async def _print_log(client: JobSubmissionClient, job: str) -> JobDetails:
    log = _Log(client, job)
    while True:
        reading = asyncio.create_task(log.read())
        while not reading.done():
            await asyncio.wait({reading}, timeout=_LOOK_S)
            if not reading.done() and _has_ended(await _info(client, job)):
                await asyncio.wait({reading}, timeout=_LAST_WORDS_S)
                reading.cancel()  # the connection is dead, and nobody has said so
                break
        info = await _info(client, job)
        if _has_ended(info) and reading.done() and not reading.cancelled():
            return info
        await asyncio.sleep(_AGAIN_S)  # the node of its driver, or the link to it, is lost


class _Log:
    """A job's log, printed once, over as many connections as that takes."""

    def __init__(self, client: JobSubmissionClient, job: str) -> None:
        self._client, self._job, self._printed = client, job, 0

    async def read(self) -> None:
        """Print what is new until the connection ends; each one tells all from the beginning."""
        from aiohttp import ClientError

        told = 0
        with suppress(RuntimeError, OSError, ClientError):
            async for lines in self._client.tail_job_logs(self._job):
                typer.echo(lines[max(0, self._printed - told) :], nl=False)
                told += len(lines)
                self._printed = max(self._printed, told)


async def _info(client: JobSubmissionClient, job: str) -> JobDetails:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            return client.get_job_info(job)
        except (RuntimeError, OSError) as error:
            if "status code 404" in str(error):
                raise DimError(f"the cluster knows no job {job}") from None
            if time.monotonic() > deadline:
                raise DimError(
                    f"the cluster has not answered for {PATIENCE_S:.0f} s; {job} may go on: "
                    f"`dim submit --attach {job}` looks again"
                ) from None
        await asyncio.sleep(_AGAIN_S)


def _has_ended(info: JobDetails) -> bool:
    return info.status in ("SUCCEEDED", "FAILED", "STOPPED")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
