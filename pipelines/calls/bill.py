"""The bill: what a job's answers cost, record by record and in all.

It is read from the answers themselves, so that it also holds what earlier, killed runs of the job
paid, and what was paid for records that were rejected or failed in the end. Who has worked on a
range leaves the sums in its receipt, so that the driver reads the answers once, a folder at a time.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields

from dim import designers
from infra.storage import Store
from pipelines.calls.answers import Entry, answer_files, read_entries

NAME = "bill.csv"

Sums = Mapping[str, float]
"""A :class:`Cost` by name, and ``bytes``, the length of the answers that it is of."""


@dataclass
class Cost:
    """What some answers cost; tokens as the server counted them, ``seconds`` spent waiting."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0

    def add(self, entry: Entry) -> None:
        """Count an answer."""
        self.requests += 1
        if entry.usage is not None:
            self.input_tokens += entry.usage.input_tokens
            self.output_tokens += entry.usage.output_tokens
            self.usd += entry.usage.usd
            self.seconds += entry.usage.seconds

    def add_sums(self, sums: Sums) -> None:
        """Count what was summed up before."""
        self.requests += int(sums["requests"])
        self.input_tokens += int(sums["input_tokens"])
        self.output_tokens += int(sums["output_tokens"])
        self.usd += sums["usd"]
        self.seconds += sums["seconds"]


def total_cost(store: Store, known: Mapping[str, Sums] | None = None) -> Cost:
    """What all answers below an output folder cost.

    Args:
        store: the output.
        known: the sums of answers about ranges, by name; those to which somebody has added since
            are read.

    Raises:
        StorageError: they cannot be read.
    """
    cost = Cost()
    for folder, files in _folders(store).items():
        sums = (known or {}).get(folder)
        if sums is not None and sums["bytes"] == sum(files.values()):
            cost.add_sums(sums)
            continue
        for entry in read_entries(store, files):
            cost.add(entry)
    return cost


def sums_of(store: Store, name: str) -> dict[str, float]:
    """What the answers about a range have cost up to now: a :data:`Sums`.

    Raises:
        StorageError: they cannot be read.
    """
    files, cost = dict(answer_files(store, name)), Cost()
    for entry in read_entries(store, files):
        cost.add(entry)
    return {"bytes": sum(files.values()), **asdict(cost)}


def read_costs(store: Store, known: Mapping[str, Sums] | None = None) -> dict[str, float]:
    """The sums over all answers, by name, as a manifest has them; ``known`` as of total_cost.

    Raises:
        StorageError: the answers cannot be read.
    """
    total = total_cost(store, known)
    return {
        "requests": total.requests,
        "input_tokens": total.input_tokens,
        "output_tokens": total.output_tokens,
        "usd": round(total.usd, 6),  # sums in another order must not make another manifest
    }


def write_bill(store: Store) -> None:
    """Write ``bill.csv``, a line per record; two where it was asked about in two ranges, as after
    its input was cut otherwise.

    Answers to records with equal images and texts were asked for once: the first one pays.

    Raises:
        StorageError: the answers cannot be read or the file cannot be written.
    """
    with store.open_output(NAME) as file:
        file.write(_csv([["id", *(field.name for field in fields(Cost))]]))
        for files in _folders(store).values():
            by_record: defaultdict[str, Cost] = defaultdict(Cost)
            for entry in read_entries(store, files):
                by_record[entry.record].add(entry)
            file.write(_csv(_line(record, cost) for record, cost in sorted(by_record.items())))


def is_billed(spec: str) -> bool:
    """Whether answers of ``spec`` cost something, so that a job that asks it has a bill."""
    return designers.calls_a_server(spec) or designers.engine_model(spec) is not None


def _folders(store: Store) -> dict[str, dict[str, int]]:
    """The folders of answers by their names, each with its files and their bytes."""
    folders: defaultdict[str, dict[str, int]] = defaultdict(dict)
    for name, size in answer_files(store):
        folders[posixpath.basename(posixpath.dirname(name))][name] = size
    return folders


def _line(record: str, cost: Cost) -> list[object]:
    tokens = (cost.requests, cost.input_tokens, cost.output_tokens)
    return [record, *tokens, f"{cost.usd:.8f}", f"{cost.seconds:.3f}"]


def _csv(lines: Iterable[Iterable[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue().encode()
