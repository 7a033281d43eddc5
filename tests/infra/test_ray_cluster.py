"""A cluster that is named by its address is shown the token that lies there for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MODE = "from ray._raylet import AuthenticationMode as M, get_authentication_mode as mode"


@pytest.mark.parametrize(
    ("token", "given", "shown"),
    [(True, None, True), (False, None, False), (True, "disabled", False)],
)
def test_a_token_is_shown_where_there_is_one(
    tmp_path: Path, token: bool, given: str | None, shown: bool
) -> None:
    if token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("0" * 64)
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    env = {name: value for name, value in os.environ.items() if name not in unset}
    env |= {"HOME": str(tmp_path)} | ({} if given is None else {"RAY_AUTH_MODE": given})
    program = (
        f"{MODE}; mode()  # as an import may have asked before\n"
        "import ray; from infra.ray_cluster import join\n"
        "ray.init = lambda address: print(address, mode() == M.TOKEN)\n"
        "join('10.0.0.1:6379')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, cwd=Path(__file__).parents[2],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.stdout.strip() == f"10.0.0.1:6379 {shown}", done.stderr
