"""``dim data collect ADDRESS``: accepted edits of a server as a source of ``dim data ingest``."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Annotated

import typer
from pydantic import ValidationError

from dim.errors import InputError
from infra.storage import Store, open_store
from serving.contributions import RECORDS, Record

PAIRS, BLUEPRINTS = "pairs.jsonl", "blueprints.jsonl"
_AT_ONCE = 16
_MOST_BYTES = 1 << 20  # of a record: two texts of 32,000 characters


def collect(store: Store) -> tuple[int, int, list[str]]:
    """Write ``pairs.jsonl`` of all records, and ``blueprints.jsonl`` of those with a blueprint.

    Returns:
        How many there are of each, and what is wrong with the records that cannot be read.

    Raises:
        StorageError: the store cannot be read or written.
    """
    names = [name for name, _ in store.list(RECORDS, suffix=".json")]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = list(pool.map(partial(_read, store), names))
    records = [each for each in read if isinstance(each, Record)]
    records.sort(key=lambda record: (record.accepted_at, record.id))
    designed = [record for record in records if record.blueprint is not None]
    store.write(PAIRS, b"".join(_lines(records)))
    store.write(BLUEPRINTS, b"".join(_lines(designed)))
    return len(records), len(designed), [each for each in read if isinstance(each, str)]


def _read(store: Store, name: str) -> Record | str:
    try:
        return Record.model_validate_json(store.read(name, most=_MOST_BYTES))
    except ValidationError as error:
        first = error.errors()[0]
        return f"{store.address(name)}: {'.'.join(map(str, first['loc']))} {first['msg']}".strip()


def _lines(records: list[Record]) -> Iterator[bytes]:
    for record in records:
        yield f"{record.model_dump_json(exclude_none=True)}\n".encode()


def main(
    address: Annotated[str, typer.Argument(help="The server's setting `contributions.store`.")],
) -> None:
    """List the accepted edits of a server, for `dim data ingest` and `replay:` designers.

    Writes pairs.jsonl and blueprints.jsonl beside the records; run again, it writes them anew.
    """
    store = open_store(address)
    pairs, blueprints, wrong = collect(store)
    typer.echo(f"{pairs} accepted edits: dim data ingest --pairs {store.address(PAIRS)} --out …")
    typer.echo(f"{blueprints} have a blueprint: --designer replay:{store.address(BLUEPRINTS)}")
    if wrong:
        raise InputError(f"{len(wrong)} records cannot be read, the first is {wrong[0]}")


if __name__ == "__main__":
    from dim.cli import run

    run(main)
