from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from dim import designers, records
from dim.caption import SCHEMA
from dim.config import validate_config
from dim.designers import CallOptions
from dim.errors import ConfigError
from infra.storage import open_store
from pipelines.calls.answers import Answers
from pipelines.readers import sources
from pipelines.stages.caption import CaptionRules, WriteCaptions
from tests.chat_server import ChatServer, Response, completion, text_of
from tests.pipelines.samples import encoded, photo, read_here

GOOD = "A calm field of colours\nunder a wide sky."
FIELDS = {name: "not present" for name in SCHEMA["required"]} | {
    "main_subject": "A calm field lies under a wide sky.",
    "colours": "The grass is green and the sky is blue.",
    "lighting": "The light is soft.",
    "kind_of_scene": "It is a meadow outdoors.",
}
RULES = CaptionRules(min_words=5, min_dimensions=3)


def raw_images(folder: Path, count: int) -> pa.Table:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.png").write_bytes(encoded(photo(number, (40 + number, 40))))
    source = sources.images_from_folder(str(folder), None, 10)
    batch = pa.concat_tables(read_here(source))
    return batch.select(records.RAW_IMAGE.names)


def captions(spec: str, out: Path, rules: CaptionRules) -> WriteCaptions:
    calls = CallOptions(retries=0, in_flight=1)
    answers = Answers(open_store(str(out)), "range")
    return WriteCaptions(designers.create_captioner(spec, calls=calls), answers, rules)


def stage(server: ChatServer, out: Path, rules: CaptionRules = RULES) -> WriteCaptions:
    return captions(f"openai:m@{server.url}", out, rules)


def test_an_image_that_is_shown_smaller_is_asked_about_again(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    chat_server.respond = lambda request: completion(GOOD)
    batch = raw_images(tmp_path / "in", 3)  # 40, 41 and 42 pixels wide, 40 high
    for max_pixels, asked in ((None, 3), (41 * 40, 1), (41 * 40, 0), (40 * 40, 2)):
        chat_server.requests.clear()
        calls = CallOptions(retries=0, max_pixels=max_pixels)
        store = open_store(str(tmp_path / "out"))
        spec = f"openai:m@{chat_server.url}"
        captioner = designers.create_captioner(spec, calls=calls)
        WriteCaptions(captioner, Answers(store, "range"), RULES)(batch)
        assert len(chat_server.requests) == asked


def test_every_kind_of_answer_has_its_outcome(tmp_path: Path, chat_server: ChatServer) -> None:
    answers = iter(
        [
            completion(GOOD),
            completion(json.dumps(FIELDS)),
            completion("Too short"),
            completion("I'm sorry, I can't describe this picture at all."),
            completion(json.dumps(FIELDS)[:-20]),
            completion("Ein weites Feld unter einem hohen blauen Himmel."),
            Response(b"", 503),
        ]
    )
    chat_server.respond = lambda request: next(answers)
    rules = RULES.model_copy(update={"reasks": 0})
    rows = stage(chat_server, tmp_path / "out", rules)(raw_images(tmp_path / "in", 7)).to_pylist()
    assert [row["reason"] or row["outcome"] for row in rows] == [
        "kept",
        "kept",
        "caption.too_short",
        "caption.refusal",
        "caption.unreadable",
        "caption.language",
        "failed",
    ]
    assert rows[0]["caption"] == "A calm field of colours under a wide sky."
    assert rows[1]["caption"] == (
        "A calm field lies under a wide sky. The grass is green and the sky is blue. It is a "
        "meadow outdoors. The light is soft."
    )
    assert rows[0]["captioner"] == "openai:m"
    assert (rows[2]["value"], rows[2]["threshold"]) == (2.0, 5.0)


def test_a_caption_is_asked_for_again_with_what_was_wrong(
    tmp_path: Path, chat_server: ChatServer
) -> None:
    def respond(request: dict[str, Any]) -> Response:
        told = "2 words (2, and the limit is 5)" in text_of(request)
        return completion(GOOD if told else "Too short")

    chat_server.respond = respond
    batch = raw_images(tmp_path / "in", 2)
    rows = stage(chat_server, tmp_path / "out")(batch).to_pylist()
    assert [row["outcome"] for row in rows] == ["kept", "kept"]
    assert len(chat_server.requests) == 4
    chat_server.requests.clear()
    assert stage(chat_server, tmp_path / "out")(batch).to_pylist() == rows
    assert chat_server.requests == []


def test_it_is_rejected_after_so_many_answers(tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: completion("Too short")
    (row,) = stage(chat_server, tmp_path / "out")(raw_images(tmp_path / "in", 1)).to_pylist()
    assert (row["outcome"], row["reason"]) == ("rejected", "caption.too_short")
    assert len(chat_server.requests) == 1 + RULES.reasks


def test_recorded_captions_are_read_by_the_same_rules(tmp_path: Path) -> None:
    batch = raw_images(tmp_path / "in", 2)
    hashes = batch["image_hash"].to_pylist()
    recording = tmp_path / "captions.jsonl"
    lines = [
        {"image_hash": hashes[0], "caption": GOOD},
        {"image_hash": hashes[1], "caption": "no"},
    ]
    recording.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = captions(f"replay:{recording}", tmp_path / "out", RULES)(batch).to_pylist()
    assert [row["reason"] or row["outcome"] for row in rows] == ["kept", "caption.too_short"]


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"min_words": 50, "max_words": 20}, "min_words is larger"),
        ({"language": "fr"}, "language"),
        ({"min_dimensions": 22}, "min_dimensions"),
        ({"reasks": -1}, "reasks"),
    ],
)
def test_wrong_rules_are_named(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        validate_config(CaptionRules, given, where="test")
