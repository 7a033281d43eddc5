"""The way back: edits whose clients consent and accept them are contributions to train on.

Nothing is held unless the server is configured for it and the request consents. What a client has
not accepted lies in memory and expires; what it has is written to the object store: the pictures,
then a record that names them. ``dim data collect`` makes a source of ``dim data ingest`` of these.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict
from ray.serve.handle import DeploymentHandle

from dim.blueprint import Blueprint
from dim.errors import BlueprintError
from dim.records import sha256_hex
from infra.storage import Store, open_store
from serving.config import Consent, ContributionsConfig
from serving.encoding import OutputFormat
from serving.errors import BadRequestError, NotFoundError
from serving.keys import Client
from serving.protocol import ContributionAnswer, EditFields

RECORDS, IMAGES = "records", "images"
"""Folders of the store. A record is written last and taken away first."""

logger = logging.getLogger("ray.serve")

_ID = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True)
class Contribution:
    """An edit whose client may accept it.

    Attributes:
        instruction: what was asked for.
        source: the upright picture that was edited, as PNG.
        edited: the file that the client got.
        format: of that file.
        text: what was painted from: the blueprint, else the instruction.
        provenance: what the file says of itself.
    """

    instruction: str
    source: bytes
    edited: bytes
    format: OutputFormat
    text: str
    provenance: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes that it takes, about."""
        return len(self.source) + len(self.edited) + 4 * (len(self.text) + len(self.instruction))


class Record(BaseModel):
    """An accepted edit, in the names that ``dim data ingest`` and ``replay:`` designers know.

    ``image_path`` and ``image_path_target`` are relative to the store; ``image_hash`` is the
    source's SHA-256. ``blueprint`` is the accepted one, ``None`` where there is none that can be
    read; ``text`` is what was painted from. ``accepted_at``: seconds since the epoch.
    """

    model_config = ConfigDict(extra="forbid")

    id: str
    instruction: str
    image_path: str
    image_path_target: str
    image_hash: str
    blueprint: str | None
    text: str
    provenance: dict[str, str]
    accepted_at: int


class Contributions:
    """What may yet be accepted. A deployment of one replica: any ingress may hear of it later.

    Args:
        config: how much is held for how long, and where what is accepted goes.
    """

    def __init__(self, config: ContributionsConfig) -> None:
        self._config = config
        self._store = open_store(config.store)
        self._held: OrderedDict[str, tuple[float, Contribution]] = OrderedDict()
        self._bytes = 0
        self._changing = asyncio.Lock()  # what is forgotten while it is written stays forgotten
        self._alarm: asyncio.TimerHandle | None = None

    async def hold(self, contribution: Contribution) -> str | None:
        """Hold an edit until it is accepted or its time is over; the oldest make room.

        Returns:
            Its name, which nobody can guess; ``None``: it is larger than all that may be held.
        """
        most = self._config.most_megabytes * 1e6
        if contribution.size > most:
            return None
        id = secrets.token_hex(16)
        self._held[id] = (time.monotonic() + self._config.keep_s, contribution)
        self._bytes += contribution.size
        while self._bytes > most or len(self._held) > self._config.most:
            self._drop(next(iter(self._held)))
        self._expire()
        return id

    async def accept(self, id: str, blueprint: str | None) -> None:
        """Write a contribution to the store; a second time changes nothing.

        Args:
            id: as ``hold`` gave it.
            blueprint: what describes the edit, better than the one that was painted from.

        Raises:
            NotFoundError: there is none, or not any more.
            BadRequestError: the blueprint is none.
            StorageError: the store refuses it; it is held as before.
        """
        async with self._changing:
            _, contribution = self._held.get(id, (0, None))
            if contribution is None:
                if not await self._is_written(id):
                    raise no_such(id)
                return
            record = record_of(id, contribution, blueprint)
            await asyncio.to_thread(write, self._store, record, contribution)
            self._drop(id)

    async def forget(self, id: str) -> None:
        """Take back a contribution, accepted or not.

        Raises:
            NotFoundError: there is none, or not any more.
            StorageError: the store cannot delete it.
        """
        async with self._changing:
            held = self._drop(id)
            written = await self._is_written(id)
            if written:
                await asyncio.to_thread(delete, self._store, id)
        if not (held or written):
            raise no_such(id)

    def held(self) -> tuple[int, int]:
        """How many are held, and their bytes."""
        return len(self._held), self._bytes

    async def _is_written(self, id: str) -> bool:
        name = record_name(id)
        return bool(_ID.fullmatch(id)) and await asyncio.to_thread(self._store.is_file, name)

    def _expire(self) -> None:
        """Drop those whose time is over, the first ones, and come back for the next."""
        now = time.monotonic()
        while self._held and next(iter(self._held.values()))[0] <= now:
            self._drop(next(iter(self._held)))
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        if self._held:
            ends, _ = next(iter(self._held.values()))
            loop = asyncio.get_running_loop()
            self._alarm = loop.call_later(ends - now, self._expire)

    def _drop(self, id: str) -> bool:
        _, contribution = self._held.pop(id, (0, None))
        self._bytes -= contribution.size if contribution else 0
        return contribution is not None


class ContributionRoutes:
    """The ingress's side: holds, and answers for, what the deployment holds.

    Args:
        holder: handle of the :class:`Contributions` deployment; ``None``: nothing is kept here.
    """

    def __init__(self, holder: DeploymentHandle | None) -> None:
        self._holder = holder

    def offered(self, client: Client) -> Consent:
        """Whether edits of a client may be kept here."""
        return "never" if self._holder is None else client.contributions

    def settled(self, wanted: EditFields, client: Client) -> EditFields:
        """``wanted``, with the consent of its client's key where it says nothing itself.

        Raises:
            BadRequestError: it consents to what is not done.
        """
        offered = self.offered(client)
        if wanted.consent and offered == "never":
            whose = "no edits" if self._holder is None else f"none of {client.name!r}"
            raise BadRequestError(
                f"consent: this server keeps {whose} for training; leave it out", param="consent"
            )
        if offered != "always" or "consent" in wanted.model_fields_set:
            return wanted
        return wanted.model_copy(update={"consent": True})

    async def hold(self, contribution: Contribution) -> str | None:
        """See :meth:`Contributions.hold`; ``None`` also where it cannot be held for now."""
        assert self._holder is not None
        try:
            held: str | None = await self._holder.hold.remote(contribution)
        except Exception:  # the edit is painted, and worth more than what may be learnt from it
            logger.exception("an edit could not be held for its client to accept")
            return None
        return held

    async def accept(self, id: str, blueprint: str | None) -> ContributionAnswer:
        """See :meth:`Contributions.accept`."""
        if self._holder is None:
            raise no_such(id)
        await self._holder.accept.remote(id, blueprint)
        return ContributionAnswer(id=id, status="accepted")

    async def forget(self, id: str) -> ContributionAnswer:
        """See :meth:`Contributions.forget`."""
        if self._holder is None:
            raise no_such(id)
        await self._holder.forget.remote(id)
        return ContributionAnswer(id=id, status="forgotten")


def record_of(id: str, contribution: Contribution, blueprint: str | None) -> Record:
    """What is written of an accepted contribution; errors as of :meth:`Contributions.accept`."""
    accepted: str | None
    try:
        accepted = Blueprint.parse(
            contribution.text if blueprint is None else blueprint,
            instruction=contribution.instruction,
        ).render()
    except BlueprintError as error:
        if blueprint is not None:
            raise BadRequestError(f"blueprint: {error}", param="blueprint") from None
        accepted = None  # it was painted from the instruction, or from another kind of text
    suffix = "jpg" if contribution.format == "jpeg" else contribution.format
    return Record(
        id=id,
        instruction=contribution.instruction,
        image_path=f"{IMAGES}/{id}.source.png",
        image_path_target=f"{IMAGES}/{id}.edited.{suffix}",
        image_hash=sha256_hex(contribution.source),
        blueprint=accepted,
        text=contribution.text,
        provenance=contribution.provenance,
        accepted_at=int(time.time()),
    )


def write(store: Store, record: Record, contribution: Contribution) -> None:
    """Write pictures and record; cut off, it leaves pictures that no record names.

    Raises:
        StorageError: the store refuses them.
    """
    store.write(record.image_path, contribution.source)
    store.write(record.image_path_target, contribution.edited)
    store.write(record_name(record.id), f"{record.model_dump_json()}\n".encode())


def delete(store: Store, id: str) -> None:
    """Delete an accepted contribution: the record, then its pictures.

    Raises:
        StorageError: the store cannot.
    """
    name = record_name(id)
    record = Record.model_validate_json(store.read(name))
    store.delete(name)
    for picture in (record.image_path, record.image_path_target):
        store.delete(picture)


def record_name(id: str) -> str:
    """Where the record of a contribution lies in the store."""
    return f"{RECORDS}/{id}.json"


def no_such(id: str) -> NotFoundError:
    """What is answered for a name that nothing is held by."""
    return NotFoundError(
        f"there is no contribution {id[:40]!r}: it has expired, or never was held",
        param="id",
        code="contribution_not_found",
    )
