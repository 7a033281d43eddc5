from __future__ import annotations

import io
import json
from dataclasses import astuple
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dim.blueprint import SCHEMA, Blueprint
from dim.designers import DesignRequest, create, create_captioner
from dim.errors import BlueprintError, DesignerError
from dim.records import sha256_hex

PLAN = Blueprint("Add a hat.", "b", "c", "d", "e").render()


def encoded(colour: str, format: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), colour).save(buffer, format=format)
    return buffer.getvalue()


def record(path: Path, *lines: dict[str, Any] | str) -> str:
    path.write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return f"replay:{path}"


def test_answers_by_instruction_where_no_image_is_recorded(tmp_path: Path) -> None:
    line = {"instruction": "Add a hat.", "blueprint": PLAN, "image": "not/there.jpg"}
    designer = create(record(tmp_path / "a.jsonl", line))
    found, missing = designer.design(
        [DesignRequest(" add a  HAT. ", encoded("red")), DesignRequest("Other", encoded("red"))]
    )
    assert found == PLAN
    assert isinstance(missing, DesignerError) and "no answer for this image" in str(missing)
    assert designer.name == "replay:a.jsonl"
    assert not designer.costly


def test_answers_by_image_where_one_is_recorded(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    spec = record(
        tmp_path / "a.jsonl",
        {"instruction": "x", "blueprint": "for red", "image_path": "red.png"},
        {"instruction": "x", "blueprint": "for blue", "image_hash": sha256_hex(encoded("blue"))},
    )
    requests = [DesignRequest("x", encoded(colour)) for colour in ("red", "blue", "green")]
    red, blue, green = create(spec).design(requests)
    assert (red, blue) == ("for red", "for blue")
    assert isinstance(green, DesignerError)


def test_the_same_pixels_in_another_file_are_the_same_image(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    spec = record(tmp_path / "a.jsonl", {"instruction": "x", "blueprint": "y", "image": "red.png"})
    assert create(spec).design([DesignRequest("x", encoded("red", "BMP"))]) == ["y"]


def test_the_public_form_needs_no_instruction(tmp_path: Path) -> None:
    (tmp_path / "image").mkdir()
    (tmp_path / "image" / "a_source.png").write_bytes(encoded("red"))
    line = {"id": "a", "image_path": "image/a_source.png", "image_path_target": "t", "prompt": PLAN}
    designer = create(record(tmp_path / "tos_dataset_edit.jsonl", line))
    assert designer.design([DesignRequest("Add a hat.", encoded("red"))]) == [PLAN]


def test_contradicting_answers_answer_nothing(tmp_path: Path) -> None:
    lines = [{"instruction": "x", "blueprint": text} for text in ("a", "b", "b")]
    (reply,) = create(record(tmp_path / "a.jsonl", *lines)).design([DesignRequest("x", b"")])
    assert isinstance(reply, DesignerError) and "2 different answers" in str(reply)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{not json", "line 2, is not JSON"),
        ("[1]", "line 2, is not a JSON object"),
        ('{"instruction": "x"}', "line 2, has no text under 'blueprint' or 'prompt'"),
        ('{"prompt": "not a blueprint"}', "line 2, has no instruction"),
    ],
)
def test_a_bad_recording_says_where(tmp_path: Path, line: str, complaint: str) -> None:
    spec = record(tmp_path / "a.jsonl", {"instruction": "x", "blueprint": "y"}, line)
    with pytest.raises(DesignerError, match=complaint):
        create(spec)


def test_captions_go_by_image(tmp_path: Path) -> None:
    (tmp_path / "red.png").write_bytes(encoded("red"))
    captioner = create_captioner(
        record(tmp_path / "a.jsonl", {"caption": "red", "image_path": "red.png"})
    )
    red, blue = captioner.caption([encoded("red"), encoded("blue")])
    assert red == "red"
    assert isinstance(blue, DesignerError)
    with pytest.raises(DesignerError, match="names no image"):
        create_captioner(record(tmp_path / "b.jsonl", {"caption": "red", "image": "gone.png"}))


def test_replays_every_real_blueprint_that_is_told_apart(shared_real: Path) -> None:
    path = shared_real / "blueprints" / "imgedit_qwen2.5vl_3b.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    replies = create(f"replay:{path}").design([DesignRequest(x["instruction"], b"") for x in lines])
    answered = [(x, r) for x, r in zip(lines, replies, strict=True) if isinstance(r, str)]
    assert len(answered) > 500
    assert all(line["blueprint"] == reply for line, reply in answered)
    others = [reply for reply in replies if not isinstance(reply, str)]
    assert all("different answers" in str(error) for error in others)


def test_an_answer_may_be_the_object_that_was_asked_for(tmp_path: Path) -> None:
    plan = dict(zip(SCHEMA["required"], astuple(Blueprint.parse(PLAN)), strict=True))
    designer = create(record(tmp_path / "a.jsonl", {"blueprint": plan}))
    (found,) = designer.design([DesignRequest("Add a hat.", encoded("red"))])
    assert Blueprint.parse(found).render() == PLAN


def test_an_answer_may_lie_where_reasoning_belongs(tmp_path: Path) -> None:
    line = {"instruction": "Add a hat.", "blueprint": None, "reasoning_content": PLAN}
    thoughts = {"instruction": "Other", "blueprint": "", "reasoning": f"Let me see.\n\n{PLAN}"}
    both = {"instruction": "Both", "blueprint": PLAN, "reasoning_content": "Let me see."}
    designer = create(record(tmp_path / "a.jsonl", line, thoughts, both))
    requests = [DesignRequest(text, encoded("red")) for text in ("Add a hat.", "Other", "Both")]
    alone, thought, beside = designer.design(requests)
    assert Blueprint.parse(alone).render() == PLAN == beside
    with pytest.raises(BlueprintError, match="reasoning alone"):
        Blueprint.parse(thought)
