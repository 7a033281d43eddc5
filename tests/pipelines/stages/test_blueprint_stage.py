from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from dim import designers, records
from dim.blueprint import PLAN_VERSION, SCHEMA, Blueprint
from dim.designers import CallOptions
from infra.storage import open_store
from pipelines.calls.answers import Answers, answer_key
from pipelines.calls.worker import AskingWorker, AskInTurn, CalledModel, Step
from pipelines.outcome import to_table
from pipelines.readers import sources
from pipelines.readers.layout import load_layout
from pipelines.readers.records import pair_columns
from pipelines.stages.blueprint import WriteBlueprints
from pipelines.stages.triage import TriageBy, TriageInstructions
from tests.chat_server import ChatServer, Response, completion, images_of, text_of
from tests.pipelines.samples import encoded, photo, read_here, write_pairs

QUICK = CallOptions(retries=0, timeout_s=5)
PLAN = Blueprint("Add a red box on the left.", "A field.", "- grass", "The left.", "A box.")


def raw_pairs(folder: Path, count: int) -> pa.Table:
    source = sources.from_records(
        str(write_pairs(folder, count)), load_layout("pairs", pairs=True), None, 100
    )
    table = pa.concat_tables(read_here(source))
    return table.select(records.RAW_PAIR.names)


def model(spec: str, out: Path) -> CalledModel:
    return CalledModel(spec, designers.create, QUICK, open_store(str(out)))


def asking(steps: Sequence[Step], called: CalledModel) -> AskInTurn:
    """The steps for a range of records."""
    made = called.create(called.spec, calls=called.calls)
    return AskInTurn(steps, made, called.answers("range"))


def stage(
    server: ChatServer, out: Path, with_target: bool = True, triage: TriageBy = "own_call"
) -> AskInTurn:
    """Triage and blueprint as `dim data edit` has them."""
    write = partial(WriteBlueprints, with_target=with_target)
    steps = (TriageInstructions, write) if with_target and triage == "own_call" else (write,)
    return asking(steps, model(f"openai:m@{server.url}", out))


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


def test_an_answer_holds_for_what_was_shown(tmp_path: Path, chat_server: ChatServer) -> None:
    """A plain file within the size is known by its hash, as ever; others by what is made of it."""
    chat_server.respond = lambda request: completion(PLAN.render())
    turned, size = Image.Exif(), (64 * 48, 32 * 24)
    turned[0x0112] = 6
    kinds = [encoded(photo(0)), encoded(photo(1), exif=turned), encoded(photo(2, (128, 96)))]
    batch = pa.Table.from_pylist(
        [
            {
                **{"id": str(place), "index": place, "source": "t", "outcome": "kept"},
                **pair_columns(f"Do {place}.", image, encoded(photo(9))),
                "instruction": f"Do {place}.",
            }
            for place, image in enumerate(kinds)
        ],
        schema=to_table([], records.RAW_PAIR).schema,
    )
    out = open_store(str(tmp_path / "out"))
    plain = batch.to_pylist()[0]
    Answers(out, "range").add(
        answer_key(
            "openai:m temperature=0.0 max_tokens=2048",
            PLAN_VERSION,
            plain["image_hash"],
            None,
            plain["instruction"],
        ),
        PLAN.render(),
    )

    def asked(max_pixels: int | None) -> list[str]:
        chat_server.requests.clear()
        calls = CallOptions(retries=0, timeout_s=5, max_pixels=max_pixels)
        called = CalledModel(f"openai:m@{chat_server.url}", designers.create, calls, out)
        write = partial(WriteBlueprints, with_target=False)
        table = asking((write,), called)(batch)
        assert table["outcome"].to_pylist() == ["kept"] * 3
        return sorted(text.partition("Do ")[2][0] for text in chat_server.texts())

    assert asked(size[0]) == ["1", "2"]  # the first was answered by an earlier version
    assert asked(size[0]) == []
    assert asked(None) == ["2"]  # now at its own size
    assert asked(size[1]) == ["0", "1", "2"]
    assert asked(size[0]) == asked(size[1]) == asked(None) == []


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


VERDICT = (
    "Differences: a box appears.\nAlignment: {}\nInstruction: Add a small red box to the left."
)
JSON_PLAN = json.dumps(dict(zip(SCHEMA["required"], asdict(PLAN).values(), strict=True)))
JSON_VERDICT = json.dumps(
    {"differences": "x", "alignment": "partially aligned", "instruction": "Add a small red box."}
)


def is_triage(request: dict[str, Any]) -> bool:
    """Whether a request asks for a verdict alone."""
    return "write three lines" in text_of(request)


def test_the_instruction_is_judged_and_refined_before_it_is_planned(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    verdicts = {"number 0": "aligned", "number 1": "partially aligned", "number 2": "misaligned"}

    def respond(request: dict[str, Any]) -> Response:
        if not is_triage(request):
            return completion(PLAN.render())
        return completion(
            next(VERDICT.format(v) for key, v in verdicts.items() if key in text_of(request))
        )

    chat_server.respond = respond
    rows = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 3)).to_pylist()
    assert [row["alignment"] for row in rows] == ["aligned", "partially aligned", None]
    assert rows[2]["reason"] == "triage.misaligned"
    assert rows[1]["instruction"] == PLAN.instruction
    assert rows[1]["original_instruction"] == "Add red box number 1."
    triages = [request for request in chat_server.requests if is_triage(request)]
    plans = [request for request in chat_server.requests if not is_triage(request)]
    assert len(triages) == 3 and len(plans) == 2  # a misaligned pair is not planned
    for plan in plans:
        assert "Add a small red box to the left" in text_of(plan)
        assert "Add red box number" not in text_of(plan)
        assert len(images_of(plan)) == 2 == len(images_of(triages[0]))
    chat_server.requests.clear()
    again = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 3)).to_pylist()
    assert again == rows and chat_server.requests == []


def test_structured_answers_are_read(tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: completion(
        JSON_VERDICT if is_triage(request) else JSON_PLAN
    )
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["outcome"] == "kept" and row["alignment"] == "partially aligned"
    assert row["blueprint"] == row["answer"] == PLAN.render()


def test_answers_in_json_behind_words_are_read(tmp_path: Path, chat_server: ChatServer) -> None:
    verdict, plan = (json.dumps(json.loads(t), indent=2) for t in (JSON_VERDICT, JSON_PLAN))
    chat_server.respond = lambda request: completion(
        f"Here is what you asked for:\n\n{verdict if is_triage(request) else plan}"
    )
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["outcome"] == "kept" and row["alignment"] == "partially aligned"
    assert row["blueprint"] == row["answer"] == PLAN.render()
    assert len(chat_server.requests) == 2


def test_json_that_is_cut_off_is_asked_for_again(tmp_path: Path, chat_server: ChatServer) -> None:
    plan = json.dumps(json.loads(JSON_PLAN), indent=2)
    plans = iter([f"Here it is:\n\n{plan[:-4]}", plan])
    chat_server.respond = lambda request: completion(
        JSON_VERDICT if is_triage(request) else next(plans)
    )
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["blueprint"] == PLAN.render()
    assert "JSON that is cut off or malformed" in chat_server.texts()[-1]


def test_answers_where_reasoning_belongs_are_read_or_named(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    def respond(request: dict[str, Any]) -> Response:
        text = VERDICT.format("aligned") if is_triage(request) else PLAN.render()
        thinks = "number 1" in text_of(request)
        return completion(None, reasoning_content=f"Let me see. {text}" if thinks else text)

    chat_server.respond = respond
    write, pairs = stage(chat_server, tmp_path / "out"), raw_pairs(tmp_path, 2)
    read, thought = write(pairs).to_pylist()
    assert (read["outcome"], read["blueprint"]) == ("kept", PLAN.render())
    assert read["alignment"] == "aligned"
    assert thought["outcome"] == "failed"
    assert "the answer lies in the model's reasoning alone" in thought["error"]
    chat_server.requests.clear()
    again = stage(chat_server, tmp_path / "out")(pairs).to_pylist()
    assert again == [read, thought] and chat_server.requests == []  # kept answers say it too


def test_a_missing_first_section_is_the_refined_instruction(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    headless = PLAN.render().partition("\n\n")[2]
    chat_server.respond = lambda request: completion(
        JSON_VERDICT if is_triage(request) else headless
    )
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["instruction"] == "Add a small red box."


@pytest.mark.parametrize(("how", "calls"), [("own_call", 2), ("same_call", 1)])
def test_one_call_can_do_both(
    tmp_path: Path, chat_server: ChatServer, how: TriageBy, calls: int
) -> None:
    both = f"Alignment: aligned\n\n{PLAN.render()}"
    chat_server.respond = lambda request: completion(
        both
        if "stop there" in text_of(request)
        else VERDICT.format("aligned")
        if is_triage(request)
        else PLAN.render()
    )
    write = stage(chat_server, tmp_path / "out", triage=how)
    (row,) = write(raw_pairs(tmp_path, 1)).to_pylist()
    assert (row["alignment"], row["blueprint"]) == ("aligned", PLAN.render())
    assert len(chat_server.requests) == calls


def test_nothing_is_paid_for_that_the_first_answer_holds(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: completion(f"Alignment: aligned\n\n{PLAN.render()}")
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["alignment"] == "aligned" and len(chat_server.requests) == 1


def test_without_a_target_there_is_one_call_and_no_verdict(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: completion(JSON_PLAN)
    write = stage(chat_server, tmp_path / "out", with_target=False)
    (row,) = write(raw_pairs(tmp_path, 1)).to_pylist()
    assert row["alignment"] == "unstated" and len(chat_server.requests) == 1
    assert "reference" not in chat_server.texts()[0]


def test_what_was_wrong_is_told_and_nothing_is_paid_twice(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    half = PLAN.render()[:60]

    def respond(request: dict[str, Any]) -> Response:
        text = text_of(request)
        if is_triage(request):
            told = "no line 'Alignment" in text
            return completion(VERDICT.format("aligned") if told else "I would say it fits.")
        return completion(PLAN.render() if "are missing" in text else half)

    chat_server.respond = respond
    batch = raw_pairs(tmp_path, 1)
    (row,) = stage(chat_server, tmp_path / "out")(batch).to_pylist()
    assert row["outcome"] == "kept" and row["blueprint"] == PLAN.render()
    assert len(chat_server.requests) == 4
    chat_server.requests.clear()
    assert stage(chat_server, tmp_path / "out")(batch).to_pylist() == [row]
    assert chat_server.requests == []


def test_a_designer_that_never_answers_well_fails_the_pair(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: completion("I'm sorry, I can't do that.")
    (row,) = stage(chat_server, tmp_path / "out")(raw_pairs(tmp_path, 1)).to_pylist()
    assert (row["outcome"], row["stage"]) == ("failed", "blueprint")
    assert "declines to judge" in row["error"]
    assert len(chat_server.requests) == 1 + 2


@pytest.mark.parametrize("spec", ["replay:gone.jsonl", "nobody"])
def test_a_stage_cannot_be_made_with_a_wrong_designer(tmp_path: Path, spec: str) -> None:
    from dim.errors import DesignerError

    with pytest.raises(DesignerError):
        AskingWorker([WriteBlueprints], model(spec, tmp_path))
