"""A server of a model, which stays when the workflow has ended."""

from __future__ import annotations

from workflows import server
from workflows.programs.program import Done, Program, Tell


def _serve(config: server.ServeStepConfig, out: str, anew: bool, tell: Tell) -> Done:
    started = server.start(config, out)
    return Done(f"open {started['url']}/ in a browser", started)


def _roll_out(config: server.RolloutConfig, out: str, anew: bool, tell: Tell) -> Done:
    moved = server.roll_out(config)
    return Done(f"{moved['url']}/: {moved['serves']}", moved)


PROGRAMS = {
    "serve": Program(
        server.ServeStepConfig, "serving", _serve, server.answering,
        how=frozenset({"port"}), clear=server.stop, stays=True,
    ),
    "rollout": Program(server.RolloutConfig, "serving", _roll_out, server.moved, stays=True),
}  # fmt: skip
