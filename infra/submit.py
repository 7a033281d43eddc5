"""``dim submit``: the same sub-command, run as a job on a Ray cluster."""

from __future__ import annotations

import asyncio
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from dim.cli import COMMANDS
from dim.errors import DimError, InputError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

NOT_UPLOADED = [".git", ".venv", "*.egg-info", "mlruns", "mlflow.db"]
AGENT_PATIENCE_S = 180.0


def main(
    command: list[str] = typer.Argument(
        ..., metavar="-- COMMAND...", help="A sub-command with its arguments: train STAGE.yaml …"
    ),
    address: str | None = typer.Option(
        None, envvar="RAY_API_SERVER_ADDRESS", help="Of the cluster's dashboard, http://HOST:8265."
    ),
    working_dir: Path = typer.Option(
        Path("."), help="Uploaded to the cluster: this project with its configuration files."
    ),
    wait: bool = typer.Option(True, help="Follow the job's log and end as it ends."),
) -> None:
    """Run a sub-command as a job on a Ray cluster.

    The cluster runs `python -m …` in a copy of the working directory, so a job is the same program
    as on this machine. Paths of data and models must mean something there: URIs, not local files.
    """
    entrypoint = entrypoint_of(command)
    client = connect(address or "http://127.0.0.1:8265")
    job = submit(client, entrypoint, working_dir)
    typer.echo(f"submitted {job}: {entrypoint}", err=True)
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
    """A client of the cluster's job server.

    Raises:
        DimError: nothing answers at ``address``.
    """
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise DimError(
            f"the cluster at {address} wants its token: put it into RAY_AUTH_TOKEN"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else "no answer"
        raise DimError(f"no Ray cluster answers at {address}: {first_line}") from None


def submit(client: JobSubmissionClient, entrypoint: str, working_dir: Path) -> str:
    """Upload ``working_dir``, start ``entrypoint`` in it and return the job's id.

    A cluster that has just come up has no agent to take jobs for some seconds; it is waited for.

    Raises:
        DimError: the folder cannot be uploaded or the cluster refuses the job.
    """
    deadline = time.monotonic() + AGENT_PATIENCE_S
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
    """Print the log of ``job`` until it ends.

    Raises:
        DimError: the job failed or was stopped.
    """
    try:
        asyncio.run(_print_log(client, job))
    except KeyboardInterrupt:
        typer.echo(f"{job} goes on; `ray job stop {job}` ends it", err=True)
        raise
    info = client.get_job_info(job)
    if info.status != "SUCCEEDED":
        said = " ".join((info.message or "no message").split())
        raise DimError(f"job {job} {info.status.lower()}: {said}")


async def _print_log(client: JobSubmissionClient, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        typer.echo(lines, nl=False)


if __name__ == "__main__":
    from dim.cli import run

    run(main)
