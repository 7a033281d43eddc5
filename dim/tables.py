"""Tables of others: Parquet and Arrow files, opened so that reading a value cannot run code.

An Arrow extension type is a name in a file's schema, and the program that knows the name decides
what a value of it becomes. Importing Ray Data makes one known whose values are unpickled, which
runs whatever the file says. So every schema that is opened goes through :func:`check_types`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from dim.errors import DimError, InputError, StorageError

HARMLESS = frozenset(
    {
        "arrow.bool8",
        "arrow.fixed_shape_tensor",
        "arrow.json",
        "arrow.opaque",
        "arrow.parquet.variant",
        "arrow.timestamp_with_offset",
        "arrow.uuid",
        "arrow.variable_shape_tensor",
        "pandas.interval",
        "pandas.period",
        *(f"datasets.features.features.Array{n}DExtensionType" for n in range(2, 6)),
    }
)
"""Extension types whose values are what they are stored as, whoever reads them: those of Arrow
itself, and those that pandas and Hugging Face write."""

_DEEPEST = 64  # as Arrow's own limit
_NAME = b"ARROW:extension:name"
_SCHEMA = b"ARROW:schema"  # in a Parquet footer: the columns as they were in Arrow

OpenedT = TypeVar("OpenedT")


def check_types(schema: pa.Schema, where: str) -> None:
    """Refuse a schema with an extension type that is not :data:`HARMLESS`, at whatever depth.

    A type counts by its name, also where this process does not know it and Arrow leaves the name in
    the field's metadata: another process may.

    Raises:
        InputError: there is one; the message names ``where``, the column and the type.
    """
    for field in schema:
        column = f"the column {field.name!r} of {where}"
        for name in _extensions(field, column):
            if name not in HARMLESS:
                raise InputError(
                    f"{column} is of the extension type {name!r}, whose values may run code when "
                    "they are read: save the file without it"
                )


def check_parquet(schema: pa.Schema, told: dict[bytes, bytes] | None, where: str) -> None:
    """:func:`check_types` of a Parquet file, by its schema and what its footer tells besides.

    The footer alone names nested types that this process does not know.

    Raises:
        InputError: a column is not plain.
        StorageError: what the footer tells of its columns cannot be read.
    """
    check_types(schema, where)
    if told and _SCHEMA in told:
        message = told[_SCHEMA]
        check_types(
            _opened(lambda: pa.ipc.read_schema(pa.py_buffer(base64.b64decode(message))), where),
            where,
        )


def open_parquet(file: pa.NativeFile, where: str, **options: Any) -> pq.ParquetFile:
    """A Parquet file whose columns are plain; ``where`` is what to call it.

    ``options`` are those of ``pyarrow.parquet.ParquetFile``; ``metadata`` must be the footer of a
    file that was opened here before.

    Raises:
        InputError: a column is not plain.
        ArrowException, OSError: it is no Parquet file, or a damaged one.
        StorageError: its schema cannot be read.
    """
    parquet = _opened(lambda: pq.ParquetFile(file, **options), where)
    if "metadata" not in options:
        schema = _opened(lambda: parquet.schema_arrow, where)
        check_parquet(schema, parquet.metadata.metadata, where)
    return parquet


def open_arrow(
    file: pa.NativeFile, where: str, columns: Collection[str] | None = None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of an Arrow stream or file whose columns are plain, and its batches.

    Args:
        file: the stream (as ``save_to_disk`` of Hugging Face writes it) or file; seekable.
        where: what to call it.
        columns: those to read, all unless given; if there is none of them, the first one is read,
            so that a batch has its rows.

    Raises:
        InputError: a column is not plain.
        ArrowException, OSError: it is no Arrow, or damaged; also while the batches are read.
        StorageError: its schema cannot be read.
    """
    schema, batches = _opened(lambda: _read_arrow(file, None), where)
    check_types(schema, where)
    if columns is not None and not set(schema.names) <= set(columns):
        chosen = [number for number, name in enumerate(schema.names) if name in columns]
        _, batches = _opened(lambda: _read_arrow(file, chosen or [0]), where)
    return schema, batches


def _read_arrow(
    file: pa.NativeFile, columns: list[int] | None
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    options = pa.ipc.IpcReadOptions(included_fields=columns)
    file.seek(0)
    start = file.read(6)
    file.seek(0)
    if start != b"ARROW1":
        stream = pa.ipc.open_stream(file, options=options)
        return stream.schema, iter(stream)
    reader = pa.ipc.open_file(file, options=options)
    batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
    return reader.schema, batches


def _opened(work: Callable[[], OpenedT], where: str) -> OpenedT:
    """A schema is made by whoever knows its extension types, and that can raise anything."""
    try:
        return work()
    except (DimError, pa.ArrowException, OSError):
        raise
    except Exception as error:
        said = " ".join(str(error).split()).partition(". ")[0][:200]
        raise StorageError(f"the schema of {where} cannot be read: {said}") from None


def _extensions(field: pa.Field, where: str, depth: int = 0) -> Iterator[str]:
    """The names of all extension types of a field."""
    if depth > _DEEPEST:
        raise InputError(f"{where} is nested more than {_DEEPEST} deep")
    if field.metadata and _NAME in field.metadata:
        yield field.metadata[_NAME].decode(errors="replace")
    kind = field.type
    while isinstance(kind, pa.BaseExtensionType) or pa.types.is_dictionary(kind):
        if isinstance(kind, pa.BaseExtensionType):
            yield kind.extension_name
            kind = kind.storage_type
        else:
            kind = kind.value_type
    for number in range(kind.num_fields):
        yield from _extensions(kind.field(number), where, depth + 1)
