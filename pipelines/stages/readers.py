"""Readers: from the description of a fixed range of records to the raw records themselves.

The driver cuts an input into ranges (see :mod:`pipelines.sources`), a worker turns a batch of
ranges into tables. What is wrong with a single record becomes that record's outcome.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from dim import records, tabletop
from dim.blueprint import Blueprint
from dim.errors import BlueprintError, InputError
from dim.images import encode_png
from infra import storage
from infra.storage import Store
from pipelines.stages.filters import probe
from pipelines.stages.outcome import KEPT, Rejection, Row, to_table, work_on

_FETCHES = 8  # images of one range that are fetched at once: an object store's latency is its cost
_ROWS_PER_TABLE = 64  # so that no more encoded images than this are held as Python objects

STAGE = "ingest"

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class JsonLines:
    """Records from lines of a JSONL file, with images beside it.

    Args:
        store: the file's folder.
        name: the file.
        source: what the records call where they come from.
    """

    store: Store
    name: str
    source: str

    def ranges(self, batch: pa.Table, build: Callable[[Row, dict], Row]) -> Iterator[list[Row]]:
        """The records of each range, a few at a time; ``build(row, line)`` does the rest."""
        with ThreadPoolExecutor(_FETCHES) as pool:
            for unit in batch.to_pylist():
                repeated = set(unit["repeated"])

                def read(row: Row, repeated: set[int] = repeated) -> Row:
                    work_on([row], STAGE, lambda row: self._read(row, repeated, build))
                    return row

                for rows in _in_parts(self._lines(unit)):
                    yield list(pool.map(read, rows))

    def _lines(self, unit: Row) -> Iterator[Row]:
        """One bare row per line that is not blank: where it is, and its text."""
        with self.store.open_input(self.name) as file:
            file.seek(unit["start"])
            data = file.read(unit["end"] - unit["start"])
        index = unit["first"]
        for number, text in enumerate(data.split(b"\n"), start=unit["line"]):
            if text.strip():
                where = {"file": self.store.address(self.name), "line": number}
                yield {
                    "id": f"{self.source}-{index:08d}",
                    "index": index,
                    "source": self.source,
                    "provenance": json.dumps(where),
                    "outcome": KEPT,
                    "text": text,
                    "line": number,
                }
                index += 1

    def _read(self, row: Row, repeated: set[int], build: Callable[[Row, dict], Row]) -> Row:
        number, text = row.pop("line"), row.pop("text")
        try:
            line = parse_line(text)
            row["id"] = _identity(line) or row["id"]
            if number in repeated:
                raise Rejection("record.repeated_id", f"an earlier line has the id {row['id']!r}")
            return build(row, line)
        except Rejection:
            raise
        except Exception as error:  # a line can name any file and hold any value
            raise InputError(f"line {number}: {error}") from None

    def image(self, line: dict, *names: str) -> tuple[bytes, str]:
        """The encoded image that a line names under one of ``names``, and that name.

        Raises:
            InputError: it names none.
            StorageError: it is not there.
        """
        path = text_of(line, *names)
        if "://" in path or path.startswith("/"):
            return storage.read_bytes(path), path
        return self.store.read(path), path


@dataclass(frozen=True)
class PairLines:
    """Edit pairs from JSONL: ``image_path``, ``image_path_target``, and ``instruction``/``prompt``.

    This is the public form of DIM-Edit; where the prompt is a blueprint, the instruction is its
    first section.
    """

    lines: JsonLines

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranges of lines in, raw pairs with outcomes out."""
        for rows in self.lines.ranges(batch, self._build):
            yield to_table(rows, records.RAW_PAIR)

    def _build(self, row: Row, line: dict) -> Row:
        row["instruction"] = _instruction(text_of(line, "instruction", "prompt"))
        image, image_path = self.lines.image(line, "image_path", "image")
        target, target_path = self.lines.image(line, "image_path_target", "image_target")
        row["provenance"] = _extend(
            row["provenance"], image_path=image_path, image_path_target=target_path
        )
        return pair_columns(row["instruction"], image, target)


@dataclass(frozen=True)
class ImageLines:
    """Images from JSONL: ``image_path`` and, where there is one, ``caption`` or ``prompt``."""

    lines: JsonLines

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranges of lines in, raw images with outcomes out."""
        for rows in self.lines.ranges(batch, self._build):
            yield to_table(rows, records.RAW_IMAGE)

    def _build(self, row: Row, line: dict) -> Row:
        image, image_path = self.lines.image(line, "image_path", "image")
        row["provenance"] = _extend(row["provenance"], image_path=image_path)
        hint = next((line[key] for key in ("caption", "prompt") if line.get(key)), None)
        return image_columns(image, str(hint) if hint is not None else None)


@dataclass(frozen=True)
class ImageFiles:
    """Images from a folder, named by the ranges."""

    store: Store
    source: str

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranges of file names in, raw images with outcomes out."""
        with ThreadPoolExecutor(_FETCHES) as pool:
            for unit in batch.to_pylist():
                numbered = enumerate(unit["names"], start=unit["first"])
                for part in _in_parts(numbered):
                    yield to_table(pool.map(self._read, part), records.RAW_IMAGE)

    def _read(self, numbered: tuple[int, str]) -> Row:
        index, name = numbered
        row = {
            "id": str(PurePosixPath(name).with_suffix("")),
            "index": index,
            "source": self.source,
            "provenance": json.dumps({"file": self.store.address(name)}),
            "outcome": KEPT,
        }
        work_on([row], STAGE, lambda _: image_columns(self.store.read(name), None))
        return row


@dataclass(frozen=True)
class TabletopPairs:
    """Edit pairs of the tabletop world, record ``i`` drawn from the seed pair ``[seed, i]``."""

    seed: int
    size: int
    kinds: tuple[str, ...]
    referential: float
    objects: tuple[int, int]
    outlines: float

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranges of places in, raw pairs out."""
        for places in _places(batch):
            yield to_table(map(self._draw, places), records.RAW_PAIR)

    def _draw(self, index: int) -> Row:
        rng = np.random.default_rng([self.seed, index])
        edit = tabletop.sample_edit(
            rng,
            kinds=self.kinds,
            referential=self.referential,
            objects=self.objects,
            outlines=self.outlines,
        )
        images = (tabletop.render(scene, self.size) for scene in (edit.source, edit.target))
        provenance = {
            "kind": edit.kind,
            "referential": edit.referential,
            "source_scene": json.loads(edit.source.to_json()),
            "target_scene": json.loads(edit.target.to_json()),
        }
        return {
            **_tabletop_identity(self.seed, index, provenance),
            "instruction": edit.instruction,
            **pair_columns(edit.instruction, *map(encode_png, images)),
        }


@dataclass(frozen=True)
class TabletopImages:
    """Scenes of the tabletop world with their captions, drawn as the pairs are."""

    seed: int
    size: int
    objects: tuple[int, int]
    outlines: float

    def __call__(self, batch: pa.Table) -> Iterator[pa.Table]:
        """Ranges of places in, raw images out."""
        for places in _places(batch):
            yield to_table(map(self._draw, places), records.RAW_IMAGE)

    def _draw(self, index: int) -> Row:
        rng = np.random.default_rng([self.seed, index])
        scene = tabletop.sample_scene(rng, self.objects, outlines=self.outlines)
        image = encode_png(tabletop.render(scene, self.size))
        return {
            **_tabletop_identity(self.seed, index, {"scene": json.loads(scene.to_json())}),
            **image_columns(image, tabletop.caption(scene)),
        }


def pair_columns(instruction: str, image: bytes, target: bytes) -> Row:
    """The columns that follow from an encoded pair.

    Raises:
        Rejection: one of them is no image.
    """
    probe(target, "the target")
    image_hash, target_hash = records.sha256_hex(image), records.sha256_hex(target)
    width, height = probe(image, "the source")
    return {
        "image": image,
        "image_target": target,
        "width": width,
        "height": height,
        "image_hash": image_hash,
        "image_target_hash": target_hash,
        "content_hash": records.content_hash(image_hash, target_hash, instruction),
    }


def image_columns(image: bytes, hint: str | None) -> Row:
    """The columns that follow from an encoded image.

    Raises:
        Rejection: it is no image.
    """
    width, height = probe(image, "the image")
    image_hash = records.sha256_hex(image)
    return {
        "image": image,
        "width": width,
        "height": height,
        "image_hash": image_hash,
        "content_hash": records.content_hash(image_hash),
        "caption_hint": records.clean_text(hint) if hint is not None else None,
    }


def parse_line(text: bytes) -> dict[str, Any]:
    """A JSONL line as an object.

    Raises:
        InputError: it is not JSON, or not an object.
    """
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error})") from None
    if not isinstance(line, dict):
        raise InputError(f"a JSON {type(line).__name__} where an object was expected")
    return line


def line_id(text: bytes) -> str | None:
    """The id a line gives its record, if it does and can be read."""
    try:
        return _identity(parse_line(text))
    except InputError:
        return None


def text_of(line: dict[str, Any], *names: str) -> str:
    """The text under the first of ``names`` that a line has.

    Raises:
        InputError: it has none, or no text there.
    """
    for name in names:
        if name in line:
            value = line[name]
            if not isinstance(value, str) or not value.strip():
                raise InputError(f"{name!r} must be a text, not {json.dumps(value)[:60]}")
            return records.clean_text(value)
    raise InputError(f"no {' or '.join(map(repr, names))}")


def _identity(line: dict[str, Any]) -> str | None:
    value = line.get("id")
    return records.clean_text(str(value)) if isinstance(value, str | int) and value != "" else None


def _instruction(prompt: str) -> str:
    try:
        return Blueprint.parse(prompt).instruction
    except BlueprintError:
        return prompt.strip()


def _extend(provenance: str, **more: str) -> str:
    return json.dumps({**json.loads(provenance), **more})


def _in_parts(items: Iterable[ItemT]) -> Iterator[list[ItemT]]:
    iterator = iter(items)
    while part := list(islice(iterator, _ROWS_PER_TABLE)):
        yield part


def _places(batch: pa.Table) -> Iterator[list[int]]:
    for unit in batch.to_pylist():
        places = range(unit["first"], unit["first"] + unit["count"])
        yield from _in_parts(places)


def _tabletop_identity(seed: int, index: int, provenance: dict[str, Any]) -> Row:
    return {
        "id": f"tabletop-{seed}-{index:06d}",
        "index": index,
        "source": "tabletop",
        "provenance": json.dumps({"tabletop": provenance}),
    }
