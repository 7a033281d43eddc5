"""MLflow's model registry: what was trained gets a version, and ``models:/dim@edit1`` finds it.

A version points at a model folder, which stays where the stage has put it, and holds a hash of
that folder: what was trained over it since is not what was registered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from dim import __version__
from dim.config import shipped
from dim.errors import InputError
from dim.redaction import redact
from infra import storage
from infra.fingerprint import fingerprint
from infra.tracking import TrackingError, call, open_client

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models import ModelSignature

ResultT = TypeVar("ResultT")

SCHEME = "models:/"
DESCRIPTION = "MLmodel"
"""The file in a model folder from which MLflow knows what goes in and comes out."""

_ADDRESS = re.compile(r"models:/(?P<name>[^/@:]+)(?:@(?P<alias>[\w.-]+)|/(?P<version>\d+))")
_HASH = re.compile(r"[0-9a-f]{64}")
_METRIC = "metric."  # what begins the tags of a version that hold its metrics
_CONTENT, _RUN = "content", "run"


@dataclass(frozen=True)
class Registered:
    """A version of a registered model.

    Attributes:
        name: of the model.
        version: counted from 1.
        address: of the model folder.
        run_id: of the run that trained it.
        metrics: as they were when it was registered.
        aliases: that lead to it.
    """

    name: str
    version: int
    address: str
    run_id: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()

    @property
    def uri(self) -> str:
        """Its address, which no later version takes over."""
        return f"{SCHEME}{self.name}/{self.version}"


class Registry:
    """The registry of an MLflow store.

    Args:
        uri: of the store, as :class:`infra.tracking.Tracking` takes it.

    Raises:
        TrackingError: it cannot be opened.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._client = open_client(uri)

    def register(
        self,
        name: str,
        address: str,
        run_id: str,
        *,
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
    ) -> Registered:
        """Make a version of the model folder at ``address``; what a run left in it gets one only.

        Args:
            name: of the model, made when missing.
            address: of a folder that every machine that is to load it can read.
            run_id: of the run that trained it.
            metrics: that it is known by.
            tags: what else is said of it.

        Raises:
            TrackingError: the registry refuses it.
        """
        content = fingerprint(address)
        for known in self._call(f"look for {name}", lambda: self._search(name)):
            if known.tags.get(_CONTENT) == content and known.tags.get(_RUN) == run_id:
                return _registered(known)
        noted = {f"{_METRIC}{key}": repr(float(value)) for key, value in metrics.items()}
        noted |= {**tags, _CONTENT: content, _RUN: run_id}
        noted = {key: redact(value) for key, value in noted.items()}
        self._call(f"make the model {name}", lambda: self._make(name))
        made = self._call(
            f"register {address}",
            lambda: self._client.create_model_version(name, address, run_id, tags=noted),
        )
        return _registered(made)

    def point(self, alias: str, to: Registered) -> None:
        """Let ``models:/NAME@ALIAS`` mean a version from now on."""
        self._call(
            f"give {to.name} {to.version} the alias {alias}",
            lambda: self._client.set_registered_model_alias(to.name, alias, str(to.version)),
        )

    def find(self, name: str, alias: str) -> Registered | None:
        """What an alias leads to, if there is one."""
        found = [each for each in self._versions(name) if alias in each.aliases]
        return _registered(found[0]) if found else None

    def version(self, name: str, number: int) -> Registered:
        """A version as it is now.

        Raises:
            TrackingError: there is none of that number.
        """
        found = self._call(
            f"find version {number} of {name}",
            lambda: self._client.get_model_version(name, str(number)),
        )
        return _registered(found)

    def versions(self, name: str) -> list[Registered]:
        """Every version of a model, the newest first."""
        return [_registered(each) for each in self._versions(name)]

    def with_content(self, content: str) -> list[Registered]:
        """Every version of any model whose folder has the hash ``content``, the newest first.

        Raises:
            InputError: it is no hash.
            TrackingError: the registry cannot be read.
        """
        if not _HASH.fullmatch(content):
            raise InputError(f"{content[:80]!r} is no SHA-256 in hex")
        found = self._call(
            "look for a model by its hash",
            lambda: self._client.search_model_versions(f"tags.`{_CONTENT}` = '{content}'"),
        )
        by_name = {each.name for each in found}
        return [
            _registered(each)
            for name in sorted(by_name)
            for each in self._versions(name)
            if each.tags.get(_CONTENT) == content
        ]

    def names(self) -> list[str]:
        """The registered models."""
        return [
            str(model.name)
            for model in self._call("be read", self._client.search_registered_models)
        ]

    def resolve(self, address: str) -> str:
        """The model folder behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

        Raises:
            InputError, TrackingError: as of ``look_up``.
        """
        return self.look_up(address).address

    def look_up(self, address: str) -> Registered:
        """The version behind ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.

        Raises:
            InputError: it is no such address.
            TrackingError: there is no such version, or its folder is not what was registered.
        """
        found = _ADDRESS.fullmatch(address)
        if found is None:
            raise InputError(f"{address} is no model: models:/NAME@ALIAS or models:/NAME/VERSION")
        name, alias, version = found.group("name", "alias", "version")
        versions = self._versions(name)
        for each in versions:
            if alias in each.aliases if alias else each.version == int(version):
                return _registered(self._checked(each, address))
        uri = redact(self.uri)
        if not versions:
            raise TrackingError(f"{uri} has no registered model {name!r} ({address})")
        names = sorted({f"@{alias}" for each in versions for alias in each.aliases})
        known = f"{', '.join(names) or 'no alias'}, and versions up to {versions[0].version}"
        raise TrackingError(f"{address}: {uri} has no such version of {name} (it has {known})")

    def _checked(self, version: ModelVersion, address: str) -> ModelVersion:
        folder, content = str(version.source), version.tags.get(_CONTENT)
        if content is not None and fingerprint(folder) != content:
            raise TrackingError(
                f"{address} is version {version.version}, whose folder {folder} holds something "
                "else by now: a later run was trained into the same out"
            )
        return version

    def _make(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _versions(self, name: str) -> list[ModelVersion]:
        """The newest first, with the aliases that lead to each."""

        def read() -> list[ModelVersion]:
            found = self._search(name)
            # A search does not say them of a version; the model knows them all.
            aliases = self._client.get_registered_model(name).aliases if found else {}
            for each in found:
                each.aliases = [
                    a for a, number in aliases.items() if int(number) == int(each.version)
                ]
            return found

        full = self._call(f"look for {name}", read)
        return sorted(full, key=lambda each: int(each.version), reverse=True)

    def _search(self, name: str) -> list[ModelVersion]:
        quoted = name.replace("'", "")
        return list(self._client.search_model_versions(f"name='{quoted}'"))

    def _call(self, what: str, action: Callable[[], ResultT]) -> ResultT:
        return call(self.uri, what, action)


def is_registered(address: str) -> bool:
    """Whether an address is one of a registry and not of a folder."""
    return address.startswith(SCHEME)


def located(address: str, uri: str | None = None) -> str:
    """An address of a model with ``models:/…`` looked up, and what comes with the package found.

    Args:
        address: of a model.
        uri: of the MLflow store; ``MLFLOW_TRACKING_URI`` unless given.

    Raises:
        TrackingError: no store is known, or it has no such model.
    """
    return look_up(address, uri).address if is_registered(address) else shipped(address)


def look_up(address: str, uri: str | None = None) -> Registered:
    """The version that ``models:/…`` means now; arguments and errors as of ``located``."""
    uri = uri or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise TrackingError(
            f"{address}: which MLflow? Set MLFLOW_TRACKING_URI (or tracking.uri) to the one in "
            "which it is registered"
        )
    return Registry(uri).look_up(address)


def describe(folder: str, run_id: str, signature: ModelSignature) -> None:
    """Put into a model folder what MLflow shows of a model: :data:`DESCRIPTION`."""
    from mlflow.models import Model

    model = Model(run_id=run_id, signature=signature, metadata={"dim.version": __version__})
    model.add_flavor("dim", loader="dim.model.load", version=__version__)
    storage.open_store(folder).write(DESCRIPTION, model.to_yaml().encode())


def signature(*, edits: bool) -> ModelSignature:
    """What a DIM takes and gives, as MLflow says such things."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import ColSpec, DataType, Schema

    text = DataType.string
    asked = [ColSpec(DataType.binary, "image"), ColSpec(text, "instruction")]
    asked += [ColSpec(text, "blueprint", required=False)]
    if not edits:
        asked = [ColSpec(text, "prompt")]
    return ModelSignature(Schema(asked), Schema([ColSpec(DataType.binary, "image")]))


def _registered(version: ModelVersion) -> Registered:
    metrics = {
        key.removeprefix(_METRIC): float(value)
        for key, value in version.tags.items()
        if key.startswith(_METRIC)
    }
    return Registered(
        version.name,
        int(version.version),
        str(version.source),
        str(version.run_id),
        metrics,
        tuple(sorted(version.aliases or ())),
    )
