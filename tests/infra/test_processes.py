from __future__ import annotations

import os
import subprocess
import sys

from infra.processes import has_ended, identity, is_running


def test_a_process_is_known_while_it_runs_and_missed_when_it_has_ended() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        known = identity(other.pid)
        assert known and is_running(known, other.pid) and not has_ended(known, other.pid)
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)  # ended, and not yet waited for
        assert identity(other.pid) == "" and has_ended(known, other.pid)
    assert has_ended(known, other.pid) and not is_running(known, other.pid)


def test_another_process_of_the_same_number_is_another_one() -> None:
    ours = identity(os.getpid())
    assert is_running(ours, os.getpid())
    machine, pid, start = ours.rsplit(" ", 2)
    earlier = f"{machine} {pid} {int(start) - 1}"
    assert has_ended(earlier, os.getpid()) and not is_running(earlier, os.getpid())


def test_of_a_process_elsewhere_nothing_is_known() -> None:
    elsewhere = f"0ther-boot pid:[1] {os.getpid()} 1"
    for process in (elsewhere, ""):
        assert not has_ended(process, os.getpid()) and not is_running(process, os.getpid())
