"""A stage's checkpoints: saved while training goes on, found again, and removed when superseded.

``OUT/checkpoints/step-00000008`` is what the run was after eight steps; its files are those of
``training.checkpoint_files``. Ray Train is not told of them: of its own it keeps the latest or the
best, begins with the latest even if that is damaged, and does not start where one is missing.
"""

from __future__ import annotations

import math
import re
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import NamedTuple

import torch.distributed as dist

from dim.errors import CheckpointError, DimError, StorageError, StorageUnavailable
from infra import storage
from training import parallel
from training.checkpoint_files import (
    FORMAT,
    FORMER_FILE,
    MANIFEST,
    FileFacts,
    Layout,
    Manifest,
    Snapshot,
    merged,
    patiently,
    read_into,
    read_layout,
    read_manifest,
    write_layout,
    write_manifest,
)
from training.log import RunLog
from training.record import CHECKPOINTS_FOLDER
from training.stage import StageConfig
from training.state import TrainState, make_room, take_values, tensors_of, values_of

_WRITE_PATIENCE_S = 300.0  # with a store that is away
_FAILURES = 2  # in a row, then the run ends


class UnsavedError(DimError):
    """Checkpoints cannot be written. All workers see it at once."""


class Kept(NamedTuple):
    """What decides whether a checkpoint is kept. ``saved_at`` is in seconds."""

    step: int
    saved_at: float
    metrics: Mapping[str, float]


class Found(NamedTuple):
    """A folder of a checkpoint: its manifest, or what is wrong with it.

    ``begun`` means that nobody has finished it.
    """

    folder: str
    manifest: Manifest | None
    problem: CheckpointError | None
    begun: bool


def to_keep(checkpoints: Sequence[Kept], config: StageConfig) -> set[int]:
    """The steps of ``checkpoints`` (in order) that are kept: by each of the policies some.

    The last ``keep_checkpoints``; the best by ``keep_best``, of equal ones the first; and the first
    of all with those that are each ``keep_hours`` younger than the one before.
    """
    kept = {one.step for one in checkpoints[-config.keep_checkpoints :]}
    if config.keep_best is not None:
        name, sign = config.keep_best.metric, 1 if config.keep_best.higher_is_better else -1
        scored = [one for one in checkpoints if math.isfinite(one.metrics.get(name, math.nan))]
        if scored:
            kept.add(max(scored, key=lambda one: sign * one.metrics[name]).step)
    if config.keep_hours is not None:
        latest: float | None = None
        for one in checkpoints:
            if latest is None or one.saved_at - latest >= 3600 * config.keep_hours:
                kept.add(one.step)
                latest = one.saved_at
    return kept


class Checkpoints:
    """The checkpoints of one stage, as one of its workers handles them.

    Args:
        config: The stage.
        rank: This worker's.
        group: Of all workers, for this alone (``parallel.side_group``).
        log: Is told what was passed over and what failed.
    """

    def __init__(
        self, config: StageConfig, rank: int, group: dist.ProcessGroup | None, log: RunLog
    ) -> None:
        self._config, self._rank, self._group, self._log = config, rank, group, log
        self._store = storage.open_store(storage.join(config.out, CHECKPOINTS_FOLDER))
        self._snapshot: Snapshot | None = None
        self._writing: Future[list[str]] | None = None
        self._unsaid: Future[list[str]] | None = None
        self._failures = 0
        self._said_metric = False
        self._kept: list[Kept] = []
        self.latest = ""
        """The address of the latest one that is whole, or of that which the run began with."""

    def save(self, state: TrainState, metrics: Mapping[str, float]) -> None:
        """Copy the state, and write the copy while training goes on; all workers take part.

        The one before must be written first, so one is on its way at most. ``metrics`` are those
        that were measured after this very step.

        Raises:
            UnsavedError: the second in a row could not be written, for a reason that stays.
            StorageUnavailable: the same, because the store is away.
        """
        self._settle()
        self._check_metric(metrics)
        tensors = tensors_of(state)
        if self._snapshot is None or self._snapshot.names != list(tensors):
            self._snapshot = Snapshot(tensors, self._group)
        self._snapshot.take(tensors)
        manifest = Manifest(
            format=FORMAT,
            step=state.step,
            saved_at=time.time(),
            workers=parallel.world_size(),
            metrics=dict(metrics),
            values=values_of(state),
            layout="",
            files={},
        )
        self._writing = self._unsaid = Future()
        arguments = (self._writing, self._snapshot, manifest)
        threading.Thread(target=self._run, args=arguments, name="checkpoint", daemon=True).start()

    def finish(self) -> None:
        """Wait for the one that is being written; all workers take part.

        Raises:
            UnsavedError: it could not be written.
            StorageUnavailable: the same, because the store is away.
        """
        self._settle(allowed=0)

    def close(self) -> None:
        """Wait for it after something else has gone wrong, whatever becomes of it."""
        if self._writing is not None:
            self._writing.exception()

    def look(self) -> None:
        """Say what is to be said of the one that was being written, once it is done."""
        writing, self._unsaid = self._unsaid, None
        if writing is None:
            return
        if not writing.done():
            self._unsaid = writing
        elif isinstance(error := writing.exception(), DimError):
            self._log.say(f"warning: a checkpoint was not written, the last one stays: {error}")
        elif error is None:
            for line in writing.result():
                self._log.say(line)

    def restore(self, state: TrainState) -> bool:
        """Load the latest checkpoint that is whole; whether there is one (a collective).

        Raises:
            CheckpointError: there are some, and none of them can be used, or the store refuses.
            StorageUnavailable: it is away.
        """
        self.close()
        found = parallel.from_first(self._find() if self._rank == 0 else None)
        if isinstance(found, StorageUnavailable):
            raise found
        if isinstance(found, StorageError):
            raise CheckpointError(f"the checkpoints cannot be looked for: {found}")
        first: Exception | None = None
        for one in found or []:
            layout, problem = self._layout_of(one)
            problem = parallel.agree(problem)  # or some would begin to load, which is collective
            if problem is None:
                problem = parallel.agree(self._load(state, one, layout))
            if problem is None:
                self.latest = self._store.address(one.folder)
                whole = [other.manifest for other in found or [] if other.manifest is not None]
                self._kept = [
                    Kept(other.step, other.saved_at, other.metrics)
                    for other in reversed(whole)
                    if other.step <= state.step
                ]
                return True
            if isinstance(problem, StorageUnavailable):
                raise problem
            self._log.say(f"checkpoint {one.folder} is passed over: {problem}")
            if not one.begun:
                first = first or problem
        if first is not None:
            raise CheckpointError(
                f"none of the checkpoints in {self._store.uri} can be used; of the latest: {first}"
            )
        return False

    def _check_metric(self, metrics: Mapping[str, float]) -> None:
        """Say so once if validation does not measure what the best checkpoint goes by."""
        best = self._config.keep_best
        measured = [name for name in sorted(metrics) if name.startswith("validation_")]
        if best is None or not measured or best.metric in measured or self._said_metric:
            return
        self._said_metric = True
        self._log.say(
            f"warning: keep_best keeps nothing: validation has no {best.metric}, but "
            f"{', '.join(measured)}"
        )

    def _find(self) -> list[Found] | StorageError:
        """What there is, the latest first; an error as an answer, for the others wait for one."""
        try:
            files: dict[str, set[str]] = {}
            for name, _ in patiently(_WRITE_PATIENCE_S)(self._store.list):
                folder, _, file = name.partition("/")
                if re.fullmatch(r"step-\d{8,}", folder):
                    files.setdefault(folder, set()).add(file)
            folders = sorted(files, key=_step_of, reverse=True)
            return [self._examine(folder, files[folder]) for folder in folders]
        except StorageError as error:
            return error

    def _examine(self, folder: str, files: set[str]) -> Found:
        where = self._store.address(folder)
        if FORMER_FILE in files:
            problem = CheckpointError(
                f"{where} was saved by a former version of this program ({FORMER_FILE}), and this "
                "one does not read it: end the stage with that version, or discard it with --fresh"
            )
            return Found(folder, None, problem, begun=False)
        if MANIFEST not in files:
            problem = CheckpointError(f"{where} has no {MANIFEST}, so it was not finished")
            return Found(folder, None, problem, begun=True)
        try:
            manifest = read_manifest(self._store, folder)
        except CheckpointError as error:
            return Found(folder, None, error, begun=False)
        if missing := sorted(manifest.files.keys() - files):
            problem = CheckpointError(f"{where} lacks {missing[0]}")
            return Found(folder, None, problem, begun=False)
        return Found(folder, manifest, None, begun=False)

    def _layout_of(self, one: Found) -> tuple[Layout, Exception | None]:
        if one.manifest is None:
            return {}, one.problem
        try:
            return read_layout(self._store, one.folder, one.manifest), None
        except StorageUnavailable as error:
            return {}, error
        except (CheckpointError, StorageError) as error:
            return {}, CheckpointError(str(error))

    def _load(self, state: TrainState, one: Found, layout: Layout) -> Exception | None:
        assert one.manifest is not None
        try:
            read_into(make_room(state, layout.keys()), self._store, one.folder, layout)
            take_values(state, one.manifest.values)
        except StorageUnavailable as error:
            return error
        except (CheckpointError, StorageError) as error:
            return CheckpointError(str(error))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            return CheckpointError(f"it does not fit the model: {type(error).__name__} {reason}")
        return None

    def _run(self, writing: Future[list[str]], snapshot: Snapshot, manifest: Manifest) -> None:
        try:
            writing.set_result(self._write(snapshot, manifest))
        except BaseException as error:
            writing.set_exception(error)

    def _write(self, snapshot: Snapshot, manifest: Manifest) -> list[str]:
        """Write this worker's file, and the first worker the rest; lines to be said.

        Raises:
            DimError: on all workers the same, if one could not write.
        """
        folder = _folder(manifest.step)
        file = f"{self._rank:05d}-{uuid.uuid4().hex[:8]}.bin"  # of no one who still writes here
        try:
            wrote = patiently(_WRITE_PATIENCE_S)(snapshot.write, self._store, f"{folder}/{file}")
            mine: tuple[str, tuple[FileFacts, Layout] | Exception] = (file, wrote)
        except Exception as error:
            mine = (file, error)
        everyone = parallel.gather([mine], self._group)
        outcome: list[str] | Exception | None = None
        if everyone is not None:
            try:
                outcome = self._commit(manifest, everyone)
            except Exception as error:
                outcome = error
        outcome = parallel.from_first(outcome, self._group)
        if isinstance(outcome, Exception):
            with suppress(StorageError):
                self._store.delete(f"{folder}/{file}")
            raise outcome
        self.latest = self._store.address(folder)
        return outcome or []

    def _commit(
        self, manifest: Manifest, files: list[tuple[str, tuple[FileFacts, Layout] | Exception]]
    ) -> list[str]:
        """Make a checkpoint of what all have written, then remove what it supersedes."""
        written: dict[str, FileFacts] = {}
        layouts = []
        for name, wrote in files:
            if isinstance(wrote, Exception):
                raise wrote
            written[name], layout = wrote
            layouts.append(layout)
        folder, layout_file = _folder(manifest.step), f"layout-{uuid.uuid4().hex[:8]}.json"
        keep_trying = patiently(_WRITE_PATIENCE_S)
        written[layout_file] = keep_trying(
            write_layout, self._store, f"{folder}/{layout_file}", merged(layouts)
        )
        whole = manifest.model_copy(update={"layout": layout_file, "files": written})
        keep_trying(write_manifest, self._store, folder, whole)

        now = Kept(whole.step, whole.saved_at, whole.metrics)
        self._kept = [one for one in self._kept if one.step < now.step] + [now]
        keep = to_keep(self._kept, self._config)
        self._kept = [one for one in self._kept if one.step in keep]
        try:
            self._remove(folder, keep, {MANIFEST, *written})
        except StorageError as error:
            return [f"warning: {error}; it is tried again after the next checkpoint"]
        return []

    def _remove(self, folder: str, keep: set[int], written: set[str]) -> None:
        """Remove the folders before ``folder`` that are not kept, and what others left in it."""
        superseded = set()
        for name, _ in self._store.list():
            top, _, file = name.partition("/")
            if top == folder and file not in written:
                self._store.delete(name)
            elif re.fullmatch(r"step-\d{8,}", top) and top != folder:
                step = _step_of(top)
                if step < _step_of(folder) and step not in keep:
                    superseded.add(top)
        for top in sorted(superseded):
            self._store.delete(f"{top}/{MANIFEST}")  # first, or half of it would look damaged
            self._store.delete(top)

    def _settle(self, allowed: int = _FAILURES - 1) -> None:
        """Wait for the one that is being written; so many may fail in a row."""
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        self.look()
        if error is None:
            self._failures = 0
            return
        self._failures += 1
        if not isinstance(error, DimError):  # a worker is lost
            raise error
        if self._failures > allowed:
            if isinstance(error, StorageUnavailable):
                raise error
            raise UnsavedError(f"checkpoints cannot be written: {error}")


def _folder(step: int) -> str:
    return f"step-{step:08d}"


def _step_of(folder: str) -> int:
    return int(folder.removeprefix("step-"))
