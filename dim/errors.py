"""The errors a user sees: one sentence that says what is wrong and where."""

from __future__ import annotations

from typing import Literal

from dim.redaction import redact


class DimError(Exception):
    """Base of every error that is the user's to fix. The command line prints it as one line.

    Credentials of the URLs in its text are left out, whoever writes it.
    """

    exit_code = 1

    def __init__(self, *args: object) -> None:
        super().__init__(*(redact(arg) if isinstance(arg, str) else arg for arg in args))


class ConfigError(DimError):
    """A configuration file or override has an unknown key or a wrong value."""

    exit_code = 2


class InputError(DimError, ValueError):
    """An argument, an image or a record does not have the required form."""


BadSample = Literal["undecodable", "unreadable", "missing_value", "damaged_features", "wrong_size"]
"""What may be wrong with a sample of the training data; such samples are counted by it."""


class SampleError(InputError):
    """One sample of the training data cannot be used; others can.

    Attributes:
        reason: what is wrong with it.
    """

    def __init__(self, message: str, reason: BadSample = "unreadable") -> None:
        super().__init__(message)
        self.reason = reason


class StorageError(DimError):
    """The object store or the disk refused a read or a write."""


class StorageUnavailable(StorageError):
    """The store does not answer, is too busy, or broke off: another try may find it well."""


class UnreadableFile(StorageError):
    """A file is not there, or its bytes are not what they must be."""


class DesignerError(DimError):
    """A designer is unknown, unreachable, or answered something that is not a blueprint."""


class CallsStopped(DesignerError):
    """A model is asked nothing more: it is down, the budget is spent, or the key is refused.

    Not the answer to one request: whatever was being done stops, and can be run again.
    """


class BlueprintError(DimError, ValueError):
    """A text is not a blueprint; the message names the section that is wrong."""


class CheckpointError(DimError):
    """A model folder or checkpoint is missing, incomplete or does not fit its configuration."""
