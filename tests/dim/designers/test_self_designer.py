from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from dim import tabletop
from dim.config import load_config
from dim.designers import DesignRequest, create
from dim.designers.self_play import SETTINGS, SelfDesigner, shipped
from dim.errors import CheckpointError, DesignerError
from dim.images import encode_png
from dim.model.config import ModelConfig, weights_path
from dim.tiny.build import settings_of

CONFIGS = Path(__file__).resolve().parents[3] / "configs"


class Echo:
    """Stands in for a model: says what it was shown."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def design(self, images: Sequence[Image.Image], instructions: Sequence[str]) -> list[str]:
        self.batches.append(len(images))
        return [f"{image.width}: {text}" for image, text in zip(images, instructions, strict=True)]


def encoded(width: int) -> bytes:
    return encode_png(Image.new("RGB", (width, 16)))


def test_readable_requests_make_one_batch() -> None:
    model, told = Echo(), {}
    replies = SelfDesigner(model).design(
        [DesignRequest("a", encoded(16)), DesignRequest("b", b""), DesignRequest("c", encoded(20))],
        on_answer=told.__setitem__,
    )
    assert replies[0] == "16: a" and replies[2] == "20: c"
    assert isinstance(replies[1], DesignerError)
    assert model.batches == [2]
    assert told == {0: "16: a", 2: "20: c"}


def test_a_models_complaint_is_every_requests_error() -> None:
    class Broken:
        def design(self, images: object, instructions: object) -> list[str]:
            raise CheckpointError("weights are damaged")

    replies = SelfDesigner(Broken()).design([DesignRequest("a", encoded(16))] * 2)
    assert [str(reply) for reply in replies] == ["weights are damaged"] * 2
    assert all(isinstance(reply, DesignerError) for reply in replies)
    assert SelfDesigner(Broken()).design([DesignRequest("a", b"x")])[0] != ""


def test_the_shipped_model_is_asked_as_it_was_pretrained() -> None:
    section = load_config(ModelConfig, CONFIGS / "tiny.yaml").understanding
    settings = Path(weights_path(SETTINGS)).read_text(encoding="utf-8")
    assert settings == settings_of(section)
    assert shipped().config == section.model_copy(update={"architecture": {}})


def test_the_shipped_model_writes_blueprints() -> None:
    edits = [tabletop.sample_edit(np.random.default_rng(1000 + i)) for i in range(20)]
    requests = [
        DesignRequest(edit.instruction, encode_png(tabletop.render(edit.source, 64)))
        for edit in edits
    ]
    designer = create("self")
    replies = designer.design(requests)
    assert designer.name == "self"
    # Nine of these are right in every word, and none when the model is asked or shown otherwise.
    assert sum(str(r) == e.blueprint.render() for r, e in zip(replies, edits, strict=True)) >= 5


def test_a_saved_model_answers(tiny_model_dir: Path) -> None:
    image = encode_png(tabletop.render(tabletop.sample_scene(np.random.default_rng(1)), 64))
    designer = create(f"self:{tiny_model_dir}")
    replies = designer.design([DesignRequest("Remove the red circle.", image)] * 2)
    assert designer.name == f"self:{tiny_model_dir.name}"
    assert all(isinstance(reply, str) for reply in replies)
    assert replies[0] == replies[1]
