"""API keys: who may ask for work. A key is shown once; what is kept of it is its SHA-256.

A keys file is YAML, one entry a line, as ``dim keys new NAME`` prints it::

    - {name: "web-shop", sha256: "5e88…"}
    - {name: "nightly", sha256: "2bd8…", images_per_minute: 120, contributions: never}
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
import yaml
from pydantic import Field, TypeAdapter, ValidationError

from dim.errors import ConfigError
from serving.config import Consent, Rates

PREFIX = "dim-"
"""What every key begins with, so that scanners for leaked secrets can know one."""

KEY_BYTES = 32
FROM_ENVIRONMENT = "env:"
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_LOOK_EVERY_S = 1.0
_LONGEST_KEY = 256

logger = logging.getLogger("ray.serve")


class ClientKey(Rates):
    """One line of a keys file: a client, the hash of its key, and rates that are its own.

    A rate that is not said is the server's. ``contributions``: see ``Consent``.
    """

    name: str = Field(pattern=NAME)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    contributions: Consent = "ask"


_LINES = TypeAdapter(list[ClientKey])


@dataclass(frozen=True)
class Client:
    """Who asks. ``rates``: what it may ask for in a minute. ``contributions``: see ``Consent``."""

    name: str
    rates: Rates
    contributions: Consent = "ask"


def make_key() -> str:
    """A new key of 256 random bits."""
    return PREFIX + secrets.token_urlsafe(KEY_BYTES)


def fingerprint(key: str) -> str:
    """What is kept of a key: 64 hexadecimal digits.

    A plain SHA-256 is enough, for no list of likely passwords holds a key of 256 random bits, and
    a slow hash would let anybody keep the server busy with wrong ones.
    """
    return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()


def read_keys(text: str, where: str) -> list[ClientKey]:
    """The entries of a keys file; ``where`` is what errors call it.

    Raises:
        ConfigError: it is no list of entries, has none, or two with one name or one key.
    """
    try:
        keys = _LINES.validate_python(yaml.safe_load(text) or [])
    except yaml.YAMLError:
        raise ConfigError(f"{where} is not valid YAML") from None
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        line = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{where}: entry {line or 'list'}: {first['msg']}") from None
    if not keys:
        raise ConfigError(f"{where} holds no keys; `dim keys new NAME` makes one")
    for what in ("name", "sha256"):
        seen = [getattr(key, what) for key in keys]
        if len(set(seen)) < len(seen):
            raise ConfigError(f"{where}: two entries have the same {what}")
    return keys


def read_source(source: str) -> list[ClientKey]:
    """The entries of ``source``: a file, or ``env:NAME``, a variable that holds such a text.

    Raises:
        ConfigError: it is not there, or see ``read_keys``.
    """
    if source.startswith(FROM_ENVIRONMENT):
        name = source.removeprefix(FROM_ENVIRONMENT)
        text = os.environ.get(name)
        if text is None:
            raise ConfigError(f"the environment has no variable {name} with API keys")
        return read_keys(text, f"the variable {name}")
    try:
        return read_keys(Path(source).read_text(encoding="utf-8"), source)
    except (OSError, UnicodeDecodeError) as error:
        said = getattr(error, "strerror", None) or error
        raise ConfigError(f"cannot read the API keys of {source}: {said}") from None


class Keys:
    """The keys of a server, read again when their file changes.

    Args:
        source: as of ``read_source``.
        rates: of a client whose entry does not say its own.

    Raises:
        ConfigError: see ``read_source``.
    """

    def __init__(self, source: str, rates: Rates) -> None:
        self._source = source
        self._rates = rates
        self._stamp = self._look()
        self._keys: Sequence[ClientKey] = read_source(source)
        self._looked = time.monotonic()

    async def client(self, authorization: str) -> Client | None:
        """Whose key the header ``Authorization`` brings; ``None``: nobody's."""
        if time.monotonic() - self._looked >= _LOOK_EVERY_S:
            self._looked = time.monotonic()
            await asyncio.to_thread(self._read_again_if_changed)
        scheme, _, key = authorization.partition(" ")
        if scheme.lower() != "bearer" or len(key) > _LONGEST_KEY:
            return None
        given = fingerprint(key.strip())
        found = None
        # Every entry is compared, so that the time taken says nothing about which one is near.
        for known in self._keys:
            if hmac.compare_digest(known.sha256, given):
                found = known
        if found is None:
            return None
        return Client(found.name, found.over(self._rates), found.contributions)

    def _read_again_if_changed(self) -> None:
        stamp = self._look()
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._keys = read_source(self._source)
        except ConfigError as error:
            # Half a file, or none for a moment, must not lock out everybody.
            logger.error("the API keys stay as they were: %s", error)
        else:
            logger.warning("read %d API keys again, for their file changed", len(self._keys))

    def _look(self) -> tuple[int, int, int] | None:
        """What changes with the file; a secret that is mounted is a link to another one then."""
        if self._source.startswith(FROM_ENVIRONMENT):
            return None
        try:
            seen = os.stat(self._source)
        except OSError:
            return None
        return seen.st_mtime_ns, seen.st_size, seen.st_ino


def new(
    name: str = typer.Argument(help="Who the key is for: letters, digits, '.', '_' and '-'."),
    file: Path | None = typer.Option(
        None, help="Add the line to this keys file, which is made if it is not there."
    ),
) -> None:
    """Make an API key for `dim serve keys=FILE`, and show it once."""
    key = make_key()
    line = f'- {{name: "{name}", sha256: "{fingerprint(key)}"}}\n'
    if not re.fullmatch(NAME, name):
        raise ConfigError(f"the name {name!r} may have letters, digits, '.', '_' and '-', up to 64")
    read_keys(_written(file) + line, str(file))
    typer.echo(key)
    if file is None:
        typer.echo(f"the key is shown this once; the line for the keys file:\n{line}", nl=False)
        return
    with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "a") as opened:
        opened.write(line)


def _written(file: Path | None) -> str:
    """What is in a keys file already, ending as a line does."""
    if file is None or not file.exists():
        return ""
    text = file.read_text(encoding="utf-8")
    if text and not text.endswith("\n"):
        raise ConfigError(f"the last line of {file} has no end; add one, and try again")
    return text


if __name__ == "__main__":
    from dim.cli import run

    run(new)
