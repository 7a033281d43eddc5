"""From any exception to what its user should read: one sentence and an exit code.

Distributed frameworks wrap an error of the program several times over before the driver sees it.
This module looks through those wrappers by their public attributes, so that it needs to import
none of them.
"""

from __future__ import annotations

import errno
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from dim import errors
from dim.errors import DimError

INTERRUPTED = 130
_IN_TRACEBACK = re.compile(r"^dim\.errors\.(\w+): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Failure:
    """What is said about an exception: ``sentence`` (no line break) and the process exit code."""

    sentence: str
    exit_code: int


def find_dim_error(error: BaseException) -> DimError | None:
    """The ``DimError`` inside ``error``, however often it was wrapped, or ``None``.

    Looks at explicit and implicit causes, at the ``cause`` of a Ray task error (whose own text is
    a remote traceback), at the failures per worker of a Ray Train run and at exception groups. An
    actor that died while it was made leaves nothing but a text; that is read last.
    """
    candidates = list(_unwrap(error))
    for candidate in candidates:
        # A Ray task error also inherits from the class of its cause; its text is a traceback.
        if isinstance(candidate, DimError) and not hasattr(candidate, "as_instanceof_cause"):
            return candidate
    return next(filter(None, map(_from_traceback, candidates)), None)


def explain(error: BaseException) -> Failure:
    """The sentence and exit code for ``error``: a user's mistake, the machine's, or a bug."""
    known = find_dim_error(error)
    if known is not None:
        return Failure(_one_line(str(known)), known.exit_code)
    for candidate in _unwrap(error):
        if isinstance(candidate, KeyboardInterrupt):
            return Failure("interrupted", INTERRUPTED)
        if isinstance(candidate, OSError):
            return Failure(_explain_os_error(candidate), 1)
        if isinstance(candidate, MemoryError):
            return Failure("out of memory", 1)
        if isinstance(candidate, ModuleNotFoundError) and _is_of_others(candidate.name):
            package = str(candidate.name).partition(".")[0]
            return Failure(
                f"{package} is not installed: install this package with "
                "its extra `all`, or the one of data, train and serve that the command is of",
                1,
            )
    root = _root(error)
    said = _one_line(str(root)) or "no message"
    return Failure(f"unexpected {type(root).__name__}: {said} (--debug shows where)", 1)


def _is_of_others(module: str | None) -> bool:
    """Whether a module is one of a package that could be installed, and not of one that is."""
    return module is not None and module.partition(".")[0] not in sys.modules


def _from_traceback(error: BaseException) -> DimError | None:
    """The ``DimError`` that the last line of a traceback in the error's text names."""
    named = _IN_TRACEBACK.findall(str(error))
    kind = getattr(errors, named[-1][0], None) if named else None
    return kind(named[-1][1]) if isinstance(kind, type) and issubclass(kind, DimError) else None


def _unwrap(error: BaseException) -> Iterator[BaseException]:
    """``error`` and everything it wraps, outermost first, each once."""
    seen: set[int] = set()
    queue = [error]
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        queue.extend(_wrapped_by(current))


def _wrapped_by(error: BaseException) -> list[BaseException]:
    candidates: list[object] = [getattr(error, "cause", None), error.__cause__, error.__context__]
    if isinstance(error, BaseExceptionGroup):
        candidates.extend(error.exceptions)
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        candidates.extend(failures.values())
    candidates.append(getattr(error, "controller_failure", None))
    return [item for item in candidates if isinstance(item, BaseException)]


def _root(error: BaseException) -> BaseException:
    """The innermost explicit cause: what went wrong first."""
    current = error
    for _ in range(20):
        cause = getattr(current, "cause", None) or current.__cause__
        if not isinstance(cause, BaseException):
            break
        current = cause
    return current


def _explain_os_error(error: OSError) -> str:
    where = f": {error.filename}" if error.filename else ""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk{where}"
    if isinstance(error, PermissionError):
        return f"permission denied{where}"
    if isinstance(error, FileNotFoundError):
        return f"file not found{where}"
    return _one_line(str(error)) or type(error).__name__


def _one_line(text: str) -> str:
    return " ".join(text.split())
