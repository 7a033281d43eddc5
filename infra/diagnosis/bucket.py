"""The object store: credentials, the clock, and a small file written, read, listed and deleted."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from email.utils import parsedate_to_datetime

from dim.errors import StorageError
from infra.diagnosis.finding import Finding, Status
from infra.s3 import Connection
from infra.storage import Store, open_store

FAR_S = 300.0
"""S3 refuses requests whose time is 15 minutes from its own; clocks that drift get there."""
NEAR_S = 30.0
_PATIENCE_S = 10.0
_PAYLOAD = b"dim doctor"


def examine_store(uri: str) -> Iterator[Finding]:
    """What there is to say of the store at ``uri``. A file of its own is written and deleted."""
    try:
        store = open_store(uri)
    except StorageError as error:
        yield Finding("bucket", Status.FAILED, str(error), "say --store s3://BUCKET/FOLDER")
        return
    if store.connection is not None:
        yield _credentials()
        clock = _clock(store.connection)
        yield clock
        if clock.status is Status.FAILED and "cannot be reached" in clock.said:
            yield Finding("bucket", Status.SKIPPED, f"{uri} was not asked")
            return
    yield from _use(store)


def _credentials() -> Finding:
    import boto3
    from botocore.exceptions import BotoCoreError

    check = "credentials"
    try:
        found = boto3.Session().get_credentials()
    except BotoCoreError as error:
        advice = "mend the profile that AWS_PROFILE names, or the file it is in"
        return Finding(check, Status.FAILED, " ".join(str(error).split()), advice)
    if found is None:
        return Finding(
            check, Status.FAILED, "there are none for S3",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE, or give the machine "
            "or pod a role",
        )  # fmt: skip
    return Finding(check, Status.OK, f"found ({found.method})")


def _clock(connection: Connection) -> Finding:
    """How far this machine's clock is from the store's, by the ``Date`` of any answer."""
    import urllib3

    check = "clock"
    url = connection.endpoint or f"https://s3.{connection.region or 'us-east-1'}.amazonaws.com"
    before = time.time()
    try:
        answer = urllib3.request("GET", url, timeout=_PATIENCE_S, retries=False, redirect=False)
    except urllib3.exceptions.HTTPError as error:
        return Finding(
            check, Status.FAILED, f"{url} cannot be reached: {type(error).__name__}",
            "look at AWS_ENDPOINT_URL, the region, and whether this machine's network lets it out",
        )  # fmt: skip
    here = (before + time.time()) / 2
    try:
        ahead = here - parsedate_to_datetime(answer.headers["Date"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return Finding(check, Status.WARNING, f"{url} does not say what time it is")
    said = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    if abs(ahead) <= NEAR_S:
        return Finding(check, Status.OK, said)
    status = Status.FAILED if abs(ahead) > FAR_S else Status.WARNING
    return Finding(
        check, status, f"{said}; signed requests are refused from 15 minutes on",
        "let chrony or systemd-timesyncd set the clock of this machine",
    )  # fmt: skip


def _use(store: Store) -> Iterator[Finding]:
    folder = f".dim-doctor-{uuid.uuid4().hex}"
    name = f"{folder}/file"

    def read() -> None:
        if store.read(name) != _PAYLOAD:
            raise StorageError(f"{store.address(name)} holds other bytes than were written")

    def list_() -> None:
        if f"{name}" not in [found for found, _ in store.list(folder)]:
            raise StorageError(f"{store.uri} does not list what was just written")

    steps: list[tuple[str, Callable[[], None], str]] = [
        ("write", lambda: store.write(name, _PAYLOAD), "s3:PutObject"),
        ("read", read, "s3:GetObject"),
        ("list", list_, "s3:ListBucket"),
        ("delete", lambda: store.delete(folder), "s3:DeleteObject"),
    ]
    failed = False
    for step, action, permission in steps:
        check = f"bucket: {step}"
        if failed:
            yield Finding(check, Status.SKIPPED, "what it needs has failed")
            continue
        try:
            action()
        except StorageError as error:
            yield Finding(check, Status.FAILED, str(error), _advice(store, permission))
            failed = step == "write"
        else:
            yield Finding(check, Status.OK, store.uri)


def _advice(store: Store, permission: str) -> str:
    if store.is_local:
        return "look at who owns the folder, and whether its disk is full"
    return f"the bucket must be there, and the key or role allowed {permission}"
