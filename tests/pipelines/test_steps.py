"""What a worker that asks a model leaves of a range, without a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pytest

from dim import designers
from dim.blueprint import Blueprint
from dim.designers import CallOptions
from dim.records import EDIT
from infra.storage import open_store
from pipelines import ingest
from pipelines.calls.bill import read_costs
from pipelines.calls.worker import CalledModel
from pipelines.filters.verdicts import Judged
from pipelines.ingest import IngestConfig
from pipelines.outputs.files import Limits
from pipelines.outputs.receipts import Paid, RangeOutput, receipts_in
from pipelines.stages.blueprint import WriteBlueprints
from pipelines.steps import AskRanges
from tests.chat_server import ChatServer, completion
from tests.pipelines.samples import read_here, write_pairs

PLAN = Blueprint("Add a red box.", "A field.", "- grass", "The left.", "A field with a box.")


class Kept:
    """Raw pairs that are all kept."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self._tables = tables

    def surely(self, each: dict[str, Any]) -> Iterator[pa.Table]:
        yield self._tables[each["number"]]


@pytest.mark.parametrize("costs", [True, False])
def test_a_receipt_says_what_the_answers_cost(
    costs: bool, tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: completion(PLAN.render(), tokens=(100, 10))
    pairs = write_pairs(tmp_path, 6)
    source = ingest.open_source(IngestConfig(pairs=str(pairs), out="o", rows_per_file=2))
    tables = list(read_here(source))
    (tmp_path / "answers.jsonl").write_text("")
    spec = f"openai:m@{chat_server.url}" if costs else f"replay:{tmp_path / 'answers.jsonl'}"
    store = open_store(str(tmp_path / "out"))
    model = CalledModel(spec, designers.create, CallOptions(input_price=1e4, retries=0), store)
    steps = [partial(WriteBlueprints, with_target=False, reasks=0)]
    output = RangeOutput(store, "key", len(tables), EDIT, Limits(100))
    ask = AskRanges(steps, model, cast(Judged, Kept(tables)), output)
    ranges = [
        {"number": number, "rows": table.num_rows, "pieces": [{"file": f"part-{number}"}]}
        for number, table in enumerate(tables)
    ]
    made = list(receipts_in(ask(pa.Table.from_pylist(ranges))))
    paid = [receipt.paid for receipt in made]
    assert len(paid) == 3 and list(output.found()) == made
    if not costs:
        assert paid == [None] * 3
        return
    known = {each.folder: each.sums for each in cast(list[Paid], paid)}
    assert [sums["requests"] for sums in known.values()] == [2, 2, 2]
    assert [sums["usd"] for sums in known.values()] == pytest.approx([2.0] * 3)
    sums = {"requests": 6, "input_tokens": 600, "output_tokens": 60, "usd": 6.0}
    assert read_costs(store, known) == read_costs(store) == sums
