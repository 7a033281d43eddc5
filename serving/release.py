"""Which model a server serves, and how a running one moves on to another.

A release is a model at an address that stays what it is. The deployments load the one that the
application was made with, unless ``dim serve rollout`` has written down another since: in Ray's
own store (GCS), where replicas that start later find it too.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Generic, TypeVar

from ray.experimental import internal_kv

from dim.errors import CheckpointError
from dim.model.checkpoint.content import release_of
from dim.model.checkpoint.folder import DESCRIPTION
from infra import storage
from infra.fingerprint import fingerprint
from infra.registry import is_registered, look_up
from serving.config import model_name

logger = logging.getLogger("ray.serve")
ModelT = TypeVar("ModelT")

NAMESPACE = b"dim-serve"


@dataclass(frozen=True)
class Release:
    """A model that is served.

    ``address``: of its folder, no alias. ``name``: as clients may read it, such as ``dim/3`` of a
    registered version, else the folder's name and the beginning of its hash. ``model_hash``: see
    ``infra.fingerprint``.
    """

    address: str
    name: str
    model_hash: str


@dataclass(frozen=True)
class Served:
    """What a running application serves.

    ``model``: as its configuration says. ``release``: of the replica that was asked. ``key``: see
    ``write_release``.
    """

    model: str
    release: Release
    key: str


def find_release(model: str) -> Release:
    """What a folder, an ``s3://`` address or ``models:/…`` means now.

    Raises:
        CheckpointError, StorageError, TrackingError: there is no such model.
    """
    if is_registered(model):
        version = look_up(model)
        model_hash = _hash(version.address, model)
        return Release(version.address, f"{version.name}/{version.version}", model_hash)
    address = storage.local_path(model) if storage.is_local(model) else model
    model_hash = _hash(address, model)
    return Release(address, release_of(model_name(address), model_hash), model_hash)


def _hash(address: str, said: str) -> str:
    if not storage.open_store(address).is_file(DESCRIPTION):
        raise CheckpointError(f"no model at {said} (a model folder holds a {DESCRIPTION})")
    return fingerprint(address)


def write_release(key: str, release: Release) -> None:
    """Have every replica of the application ``key`` serve ``release``, now or when it starts."""
    internal_kv._internal_kv_put(key, json.dumps(asdict(release)).encode(), namespace=NAMESPACE)


def read_release(key: str) -> Release | None:
    """The release that was written down last, if one was."""
    if not key or not internal_kv._internal_kv_initialized():
        return None
    found = internal_kv._internal_kv_get(key, namespace=NAMESPACE)
    return None if found is None else Release(**json.loads(found))


@dataclass(frozen=True)
class Held(Generic[ModelT]):
    """A release and what was loaded of it."""

    release: Release
    model: ModelT


class Holder(Generic[ModelT]):
    """What a replica has loaded: of one release, and beside it of the next while it is made ready.

    Args:
        key: of the application, for ``read_release``; empty: there is nothing to follow.
        first: the release that it was made with.
        load: makes a release ready to work; takes its time.
        retire: is given what works no more, on a thread of its own, and may wait in it.
    """

    def __init__(
        self,
        key: str,
        first: Release,
        load: Callable[[Release], ModelT],
        retire: Callable[[ModelT], Any] = lambda _: None,
    ) -> None:
        self._key, self._load, self._retire = key, load, retire
        self._changing = threading.Lock()
        self._following = threading.Event()
        self._next: Held[ModelT] | None = None
        release = read_release(key) or first
        self.held = Held(release, load(release))

    def prepare(self, release: Release) -> None:
        """Load ``release`` beside what works; whatever it raises, that goes on."""
        with self._changing:
            self._prepare(release)

    def adopt(self, release: Release) -> None:
        """Work with ``release`` from now on; at once where it was prepared."""
        with self._changing:
            if release == self.held.release:
                return
            self._prepare(release)
            assert self._next is not None
            old, self.held, self._next = self.held, self._next, None
        logger.info("%s is served, after %s", release.name, old.release.name)
        retiring = threading.Thread(target=self._retire, args=(old.model,), name="retiring")
        retiring.daemon = True
        retiring.start()

    def discard(self) -> None:
        """Let go of what was prepared."""
        with self._changing:
            prepared, self._next = self._next, None
        if prepared is not None:
            self._retire(prepared.model)

    def follow_soon(self) -> None:
        """Adopt what was written down, where this replica was not there to be told; not at once."""
        if not self._following.is_set():
            self._following.set()
            threading.Thread(target=self._follow, name="following", daemon=True).start()

    def _follow(self) -> None:
        try:
            self.follow()
        finally:
            self._following.clear()

    def follow(self) -> None:
        """Adopt what was written down, if it is not what works; one that fails changes nothing."""
        release = read_release(self._key)
        if release is None or release == self.held.release:
            return
        try:
            self.adopt(release)
        except Exception:
            logger.exception(
                "%s cannot be served; %s goes on", release.name, self.held.release.name
            )

    def _prepare(self, release: Release) -> None:
        if release == self.held.release or (self._next and self._next.release == release):
            return
        self._next = Held(release, self._load(release))
