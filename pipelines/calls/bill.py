"""The bill: what a job's answers cost, record by record and in all.

It is read from the answers themselves, so that it also holds what earlier, killed runs of the job
paid, and what was paid for records that were rejected or failed in the end.
"""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from dataclasses import dataclass

from dim import designers
from infra.storage import Store
from pipelines.calls.answers import Entry, read_entries

NAME = "bill.csv"


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


def total_cost(store: Store) -> Cost:
    """What all answers below an output folder cost.

    Raises:
        StorageError: they cannot be read.
    """
    cost = Cost()
    for entry in read_entries(store):
        cost.add(entry)
    return cost


def read_costs(store: Store) -> dict[str, float]:
    """The sums over all answers, by name, as a manifest has them.

    Raises:
        StorageError: the answers cannot be read.
    """
    total = total_cost(store)
    return {
        "requests": total.requests,
        "input_tokens": total.input_tokens,
        "output_tokens": total.output_tokens,
        "usd": round(total.usd, 6),  # sums in another order must not make another manifest
    }


def write_bill(store: Store) -> None:
    """Write ``bill.csv``, a line per record.

    Answers to records with equal images and texts were asked for once: the first one pays.

    Raises:
        StorageError: the answers cannot be read or the file cannot be written.
    """
    by_record: defaultdict[str, Cost] = defaultdict(Cost)
    for entry in read_entries(store):
        by_record[entry.record].add(entry)
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["id", "requests", "input_tokens", "output_tokens", "usd", "seconds"])
    for record, cost in sorted(by_record.items()):
        money, seconds = f"{cost.usd:.8f}", f"{cost.seconds:.3f}"
        tokens = (cost.input_tokens, cost.output_tokens)
        lines.writerow([record, cost.requests, *tokens, money, seconds])
    store.write(NAME, text.getvalue().encode())


def is_billed(spec: str) -> bool:
    """Whether answers of ``spec`` cost something, so that a job that asks it has a bill."""
    return designers.calls_a_server(spec) or designers.engine_model(spec) is not None
