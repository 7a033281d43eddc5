from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest

from dim import records
from dim.blueprint import Blueprint
from dim.designers import CallOptions
from infra.storage import open_store
from pipelines import sources
from pipelines.layout import load_layout
from pipelines.stages.caption import CaptionRules, WriteCaptions
from pipelines.stages.design import WriteBlueprints
from tests.chat_server import ChatServer, Response, completion, images_of, text_of
from tests.pipelines.samples import encoded, photo, write_pairs

QUICK = CallOptions(retries=0, timeout_s=5)
PLAN = Blueprint("Add a red box on the left.", "A field.", "- grass", "The left.", "A box.")


def raw_pairs(folder: Path, count: int) -> pa.Table:
    source = sources.from_records(
        str(write_pairs(folder, count)), load_layout("pairs", pairs=True), None, 100
    )
    table = pa.concat_tables(source.reader(pa.Table.from_pylist(source.units)))
    return table.select(records.RAW_PAIR.names)


def stage(server: ChatServer, out: Path, with_target: bool = True) -> WriteBlueprints:
    return WriteBlueprints(f"openai:m@{server.url}", QUICK, with_target, open_store(str(out)))


def test_every_kind_of_answer_has_its_outcome(tmp_path: Path, chat_server: ChatServer) -> None:
    bold = PLAN.render().replace("1. Edit Instruction:", "1. **Edit Instruction:**")
    headless = PLAN.render().partition("\n\n")[2]
    answers = {
        "number 0": completion(f"Alignment: aligned\n\n{bold}"),
        "number 1": completion(f"Alignment: partially aligned\n\n{PLAN.render()}"),
        "number 2": completion("Alignment: misaligned\nNothing was added."),
        "number 3": completion(PLAN.render()[:120]),
        "number 4": completion("I'm sorry, but no."),
        "number 5": Response(b"<html>", 500, "text/html"),
        "number 6": completion(f"<think>hm</think>{headless}"),
        "number 7": completion(""),
    }
    chat_server.respond = lambda request: next(
        answer for key, answer in answers.items() if key in text_of(request)
    )
    rows = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 8)).to_pylist()
    assert [row["outcome"] for row in rows] == [
        "kept", "kept", "rejected", "failed", "failed", "failed", "kept", "failed",
    ]  # fmt: skip
    assert [row["alignment"] for row in rows if row["outcome"] == "kept"] == [
        "aligned",
        "partially aligned",
        "unstated",
    ]
    first, second, misaligned, half, refusal, broken, headless_row, empty = rows
    assert first["blueprint"] == PLAN.render() and first["answer"] == bold
    assert first["instruction"] == PLAN.instruction
    assert first["original_instruction"] == "Add red box number 0."
    assert first["designer"] == "openai:m" and first["image"] is not None
    assert second["answer"] == second["blueprint"]
    assert misaligned["reason"] == "triage.misaligned" and misaligned["image"] is None
    assert "are missing" in half["error"] and half["stage"] == "blueprint"
    assert "none of the five" in refusal["error"]
    assert "HTTP 500" in broken["error"]
    assert headless_row["instruction"] == "Add red box number 6."
    assert headless_row["answer"] == headless_row["blueprint"]
    assert "answered nothing" in empty["error"]


def test_the_target_is_shown_only_if_wanted(tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: completion(PLAN.render())
    batch = raw_pairs(tmp_path, 1)
    stage(chat_server, tmp_path / "a", with_target=True)(batch)
    stage(chat_server, tmp_path / "b", with_target=False)(batch)
    assert [len(images_of(request)) for request in chat_server.requests] == [2, 1]


def test_an_answer_is_paid_for_once(tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: completion(
        PLAN.render() if "number 1" not in text_of(request) else ""
    )
    batch = raw_pairs(tmp_path, 3)
    first = stage(chat_server, tmp_path / "out")(pa.concat_tables([batch, batch]))
    assert len(chat_server.requests) == 3  # equal records share a call
    chat_server.requests.clear()
    again = stage(chat_server, tmp_path / "out")(pa.concat_tables([batch, batch]))
    assert [text for text in chat_server.texts() if "number 1" not in text] == []
    assert len(chat_server.requests) == 1  # what was not answered is asked again
    assert again.equals(first)


def test_records_that_are_out_are_not_asked_about(tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: completion(PLAN.render())
    write = stage(chat_server, tmp_path / "out")
    batch = raw_pairs(tmp_path, 2)
    out = pa.array(["rejected", "kept"])
    result = write(batch.append_column("outcome", out)).to_pylist()
    assert len(chat_server.requests) == 1
    assert [row["outcome"] for row in result] == ["rejected", "kept"]


def test_an_empty_batch_asks_nothing(tmp_path: Path, chat_server: ChatServer) -> None:
    result = stage(chat_server, tmp_path)(records.RAW_PAIR.empty_table())
    assert result.num_rows == 0 and set(records.EDIT.names) < set(result.schema.names)
    assert chat_server.requests == []


def test_captions(tmp_path: Path, chat_server: ChatServer) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.png").write_bytes(encoded(photo(number, (40 + number, 40))))
    source = sources.images_from_folder(str(folder), None, 10)
    batch = pa.concat_tables(source.reader(pa.Table.from_pylist(source.units)))
    answers = iter(
        [
            completion("A calm field of colours\nunder a wide sky."),
            completion("Too short"),
            completion("I'm sorry, I can't describe this picture at all."),
            Response(b"", 503),
        ]
    )
    chat_server.respond = lambda request: next(answers)
    calls = CallOptions(retries=0, in_flight=1)
    rules = CaptionRules(min_words=5)
    store = open_store(str(tmp_path / "out"))
    write = WriteCaptions(f"openai:m@{chat_server.url}", calls, rules, store)
    rows = write(batch.select(records.RAW_IMAGE.names)).to_pylist()
    assert [row["reason"] or row["outcome"] for row in rows] == [
        "kept",
        "caption.too_short",
        "caption.refusal",
        "failed",
    ]
    assert rows[0]["caption"] == "A calm field of colours under a wide sky."
    assert rows[0]["captioner"] == "openai:m"
    assert (rows[1]["value"], rows[1]["threshold"]) == (2.0, 5.0)


@pytest.mark.parametrize("spec", ["replay:gone.jsonl", "nobody"])
def test_a_stage_cannot_be_made_with_a_wrong_designer(tmp_path: Path, spec: str) -> None:
    from dim.errors import DesignerError

    with pytest.raises(DesignerError):
        WriteBlueprints(spec, QUICK, True, open_store(str(tmp_path)))
