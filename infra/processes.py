"""Which process wrote a file, and whether it still runs: a number alone is soon another's."""

from __future__ import annotations

import os
from pathlib import Path

_UNSEEN = "unseen"


def identity(pid: int) -> str:
    """What no other process is called, here or elsewhere, nor a later one of the same number.

    Empty if there is no such process, or the system does not say. One that has ended and was not
    yet waited for is none. ``unseen``: there is one, of another user, of whom this one may see no
    more.
    """
    try:
        # pid (name) state parent …; the 22nd is the start, and a name may hold anything
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return _UNSEEN if _exists(pid) else ""
    return "" if fields[0] in "ZX" else f"{_machine()} {pid} {fields[19]}"


def has_ended(process: str, pid: int) -> bool:
    """Whether it was on this machine and is gone; of those elsewhere nobody knows.

    Args:
        process: what ``identity`` said of it then.
        pid: its number.
    """
    return _is_of_this_machine(process) and identity(pid) not in (process, _UNSEEN)


def is_running(process: str, pid: int) -> bool:
    """Whether it is on this machine and can be seen to run."""
    return _is_of_this_machine(process) and identity(pid) == process


def _is_of_this_machine(process: str) -> bool:
    here = _machine()
    return here != "" and process.startswith(f"{here} ")


def _machine() -> str:
    """This boot of this machine and what its process numbers belong to; empty if not known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError as error:
        return not isinstance(error, ProcessLookupError)  # it may be another user's
    return True
