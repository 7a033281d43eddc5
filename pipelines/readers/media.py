"""Media: images that lie apart from the records which name them by a key."""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dim.errors import InputError
from infra.storage import Store
from pipelines.outcome import Rejection
from pipelines.readers import bounds, forms
from pipelines.readers.names import said

Places = Mapping[str, tuple[str, int] | None]
"""Key → (file, row of a table or byte of a tar), or nothing where several images are called so."""


def pack(places: Places) -> bytes:
    """Places as they travel with a range: names are long, and alike."""
    return zlib.compress(json.dumps(places).encode())


def unpack(packed: bytes | None) -> Places:
    """The same places; there are none where nothing was packed."""
    places: Places = json.loads(zlib.decompress(packed)) if packed else {}
    return places


Found = dict[str, Any]
"""Name → the image's bytes, a struct or URL that stands for it, or why there is none."""


@dataclass(frozen=True)
class Media:
    """Images by key.

    Args:
        uri: what to call them.
        store: the folder that the places' files are relative to.
        image: the columns of a table that may hold the image.
        kind: what its files are: ``forms.TAR``, ``forms.TABLE``, or images if it is neither.
        max_bytes: size of an image at most; a larger one is not read.
    """

    uri: str
    store: Store
    image: tuple[str, ...]
    kind: str | None = None
    max_bytes: int = bounds.MAX_BYTES

    def read(self, places: Mapping[str, tuple[str, int]]) -> Found:
        """What lies at each place; a place that cannot be read has its error."""
        files: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for key, (file, offset) in places.items():
            files[file].append((offset, key))
        found: Found = {}
        for file, wanted in sorted(files.items()):
            try:
                found.update(self._from_file(file, sorted(wanted)))
            except Exception as error:  # a damaged file can raise anything
                where = self.store.address(file)
                broken = InputError(f"{where} cannot be read ({said(error)})")
                found.update({key: broken for _, key in wanted if key not in found})
        return found

    def _from_file(self, file: str, wanted: list[tuple[int, str]]) -> Found:
        if self.kind == forms.TAR:
            return {key: self._member(file, offset) for offset, key in wanted}
        if self.kind == forms.TABLE:
            return self._rows(file, wanted)
        try:
            image: bytes | Rejection = bounds.read_file(self.store, file, self.max_bytes)
        except Rejection as rejection:
            image = rejection
        return {key: image for _, key in wanted}

    def _member(self, file: str, offset: int) -> bytes | Exception:
        with self.store.open_input(file) as opened:
            opened.seek(offset)
            reader = bounds.TarReader(opened, self.max_bytes, io.DEFAULT_BUFFER_SIZE)
            try:
                with tarfile.open(fileobj=reader, mode="r:") as tar:
                    member = tar.next()
                    if member is None:
                        raise tarfile.ReadError("it ends there")
                    return bounds.read_member(tar, member, self.max_bytes)
            except Rejection as rejection:
                return rejection
            except (InputError, tarfile.TarError, ValueError) as error:
                where = f"byte {offset} of {self.store.address(file)}"
                return InputError(f"the image at {where} cannot be read: {error}")

    def _rows(self, file: str, wanted: list[tuple[int, str]]) -> Found:
        found: Found = {}
        keys = defaultdict(list)
        for row, key in wanted:
            keys[row].append(key)
        start, stop = wanted[0][0], wanted[-1][0] + 1
        columns = frozenset(self.image)
        for batch, first in bounds.batches(self.store, file, columns, start, stop, self.max_bytes):
            for row in [row for row in keys if first <= row < first + batch.num_rows]:
                values = bounds.cells(batch, row - first, self.max_bytes)
                value = next((values[n] for n in self.image if values.get(n) is not None), None)
                found.update({key: value for key in keys[row]})
        return found
