"""What flows between the jobs: one Arrow schema per kind of record, and how records are hashed.

Every schema carries its kind and version in its metadata, which Parquet keeps, so that a reader can
tell what it holds. Image columns hold the encoded file (JPEG, PNG, …) untouched.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import pyarrow as pa

from dim.errors import InputError

SCHEMA_VERSIONS = {
    "raw_pair": 1,
    "raw_image": 1,
    "edit": 1,
    "t2i": 1,
    "reject": 1,
    "failed": 1,
    "edit_features": 1,
    "t2i_features": 1,
}
"""By kind of record: raised whenever a column of it changes its name, type or meaning."""

KIND_KEY = b"dim.kind"
VERSION_KEY = b"dim.schema_version"

TextName = Literal["caption", "instruction", "blueprint"]
"""A text column of ``edit`` or ``t2i`` records, which a painter can be trained on."""

_IDENTITY = (
    pa.field("id", pa.string(), nullable=False),
    pa.field("index", pa.int64(), nullable=False),
    pa.field("source", pa.string(), nullable=False),
)
_SIZE = (pa.field("width", pa.int32()), pa.field("height", pa.int32()))
_TRACE = (pa.field("content_hash", pa.string()), pa.field("provenance", pa.string()))
MEASURES = pa.field(
    "measures", pa.list_(pa.struct([("name", pa.string()), ("value", pa.float64())]))
)
"""What the filters measured on a record, up to the first threshold that it missed."""


def _schema(kind: str, *fields: pa.Field) -> pa.Schema:
    metadata = {KIND_KEY: kind.encode(), VERSION_KEY: str(SCHEMA_VERSIONS[kind]).encode()}
    return pa.schema(fields, metadata=metadata)


RAW_PAIR = _schema(
    "raw_pair",
    *_IDENTITY,
    pa.field("instruction", pa.string()),
    pa.field("image", pa.large_binary()),
    pa.field("image_target", pa.large_binary()),
    *_SIZE,
    pa.field("image_hash", pa.string()),
    pa.field("image_target_hash", pa.string()),
    *_TRACE,
)
"""An edit pair as it came in. ``index`` is the record's place in its ingest, ``width`` and
``height`` are the upright source's in pixels, hashes are SHA-256 in hex, ``provenance`` is JSON."""

RAW_IMAGE = _schema(
    "raw_image",
    *_IDENTITY,
    pa.field("image", pa.large_binary()),
    *_SIZE,
    pa.field("image_hash", pa.string()),
    *_TRACE,
    pa.field("caption_hint", pa.string()),
)
"""A single image as it came in; ``caption_hint`` is a caption that came with it, if any."""

FILTERED_PAIR = _schema("raw_pair", *RAW_PAIR, MEASURES)
FILTERED_IMAGE = _schema("raw_image", *RAW_IMAGE, MEASURES)
"""Raw records that passed the filters: of the same kind, with what was measured."""

EDIT = _schema(
    "edit",
    *RAW_PAIR,
    pa.field("blueprint", pa.string()),
    pa.field("answer", pa.string()),
    pa.field("alignment", pa.string()),
    pa.field("original_instruction", pa.string()),
    pa.field("designer", pa.string()),
    MEASURES,
)
"""DIM-Edit. ``instruction`` is section 1 of the blueprint (refined where the designer was asked
to), ``original_instruction`` what came in; ``blueprint`` is in its one form, which training
and inference read, ``answer`` the same in the designer's own words, which the public form holds;
``alignment`` is a :data:`dim.blueprint.Alignment`."""

T2I = _schema(
    "t2i",
    *(field for field in RAW_IMAGE if field.name != "caption_hint"),
    pa.field("caption", pa.string()),
    pa.field("captioner", pa.string()),
    MEASURES,
)
"""DIM-T2I: an image and its long caption."""

_LEFT_OUT = (
    *_IDENTITY,
    pa.field("instruction", pa.string()),
    *_TRACE,
)

REJECT = _schema(
    "reject",
    *_LEFT_OUT,
    pa.field("reason", pa.string(), nullable=False),
    pa.field("detail", pa.string()),
    pa.field("value", pa.float64()),
    pa.field("threshold", pa.float64()),
    MEASURES,
)
"""A record that a rule dropped: a reason code such as ``pair.ssim_low``, a sentence, and the
measured value beside the threshold it missed (null where the rule has no number)."""

FAILED = _schema(
    "failed",
    *_LEFT_OUT,
    pa.field("stage", pa.string(), nullable=False),
    pa.field("error", pa.string(), nullable=False),
    MEASURES,
)
"""A record on which a stage could not do its work, and the error."""


PREPARATION_KEY = b"dim.preparation"
ENCODING_KEY = b"dim.encoding"
FEATURES_OF = {"edit": "edit_features", "t2i": "t2i_features"}
"""The kind of feature records by the kind of record that they were made of."""


def features_schema(
    kind: str, texts: Sequence[str], *, encoding: str, preparation: str
) -> pa.Schema:
    """Features of ``edit`` or ``t2i`` records: what the frozen parts say about each.

    For each text column T there is the text itself, ``T_tokens`` (how many tokens N), and
    ``T_states``: its hidden states (N, ``hidden_size``), for edits with the source in view. With
    ``encoding`` ``bf16`` these are bfloat16; with ``int8`` one byte a number, ``T_scales`` one
    float32 a token to multiply it with, and ``T_error`` the relative error that this makes.
    ``latent`` and, for edits, ``source_latent`` are bfloat16 of ``latent_shape`` (C, h, w). All
    little-endian, the last axis fastest; ``dim.features.format`` reads them.

    Args:
        kind: what the features were made of.
        texts: the text columns.
        encoding: how hidden states are kept.
        preparation: how they were made, as JSON; kept in the schema's metadata.
    """
    columns = [field for text in texts for field in _text_features(text, encoding)]
    latents = ["latent", "source_latent"] if kind == "edit" else ["latent"]
    schema = _schema(
        FEATURES_OF[kind],
        *_IDENTITY,
        *_TRACE,
        *columns,
        pa.field("hidden_size", pa.int32()),
        *(pa.field(name, pa.large_binary()) for name in latents),
        pa.field("latent_shape", pa.list_(pa.int32())),
    )
    told = {PREPARATION_KEY: preparation.encode(), ENCODING_KEY: encoding.encode()}
    return schema.with_metadata({**schema.metadata, **told})


def _text_features(text: str, encoding: str) -> list[pa.Field]:
    fields = [
        pa.field(text, pa.string()),
        pa.field(f"{text}_tokens", pa.int32()),
        pa.field(f"{text}_states", pa.large_binary()),
    ]
    if encoding == "int8":
        fields += [
            pa.field(f"{text}_scales", pa.large_binary()),
            pa.field(f"{text}_error", pa.float32()),
        ]
    return fields


def kind_of(schema: pa.Schema) -> str | None:
    """The kind of record a schema says it holds (``edit``, ``raw_pair``, …); ``None`` if none."""
    kind = (schema.metadata or {}).get(KIND_KEY)
    return kind.decode() if kind else None


def version_of(schema: pa.Schema) -> int | None:
    """The schema version that a schema says it has; ``None`` if it says none.

    Raises:
        InputError: what it says is no number.
    """
    version = (schema.metadata or {}).get(VERSION_KEY)
    if version is None:
        return None
    if not version.isdigit():
        raise InputError(f"the schema version {version.decode(errors='replace')!r} is no number")
    return int(version)


def check_version(schema: pa.Schema, where: str) -> None:
    """Refuse records whose columns may mean something that this program does not know.

    Raises:
        InputError: they are of a newer schema version; the message begins with ``where``.
    """
    version, kind = version_of(schema), kind_of(schema)
    known = SCHEMA_VERSIONS.get(kind or "", 1)
    if version is not None and version > known:
        raise InputError(
            f"{where} holds {kind or 'unknown'} records of schema version {version}, and this "
            f"program knows {known} and older; use a newer one"
        )


def is_same(found: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether two schemas have the same columns, kind and version.

    Metadata of single fields does not count: Parquet's reader numbers nested ones in it.
    """
    return found.equals(wanted) and (found.metadata or {}) == (wanted.metadata or {})


def sha256_hex(data: bytes) -> str:
    """SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def short_hash(text: str) -> bytes:
    """8 bytes that stand for a text in a large index."""
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()


def content_hash(*parts: str | None) -> str:
    """One hash over what makes a record what it is: its image hashes and its instruction."""
    return sha256_hex("\0".join(part or "" for part in parts).encode())


def clean_text(text: str) -> str:
    """``text`` with halves of surrogate pairs replaced by ``?``: Arrow and files hold UTF-8."""
    return text.encode("utf-8", "replace").decode("utf-8")
