"""The shipped painter's build at a fraction of its size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import dim
from dim import tabletop
from dim.config import load_config
from dim.errors import InputError
from dim.model import build as build_model
from dim.model.config import ModelConfig
from dim.tiny.config import TinyBuildConfig
from workflows.tiny import CONFIGS, PARTS, build

MODEL = CONFIGS / "tiny.yaml"
DEMO_KINDS = ("add", "remove", "replace", "adjust", "background", "extract")


def settings(work: Path) -> TinyBuildConfig:
    stage = ["steps=3", "batch_size=4", "warmup_steps=1", "log_every=1"]
    small = ["painter.scenes=8", "evaluate=2", f"painter.work={json.dumps(str(work))}"]
    small.append(f"painter.stage_overrides={json.dumps(stage)}")
    small.append(f"editor.model={json.dumps(str(work / 'edit2' / 'model'))}")
    return load_config(TinyBuildConfig, CONFIGS / "tiny-build.yaml", small)


def test_the_painter_is_a_stage_on_what_the_data_jobs_make(
    ray_cluster: None, tmp_path: Path
) -> None:
    out, config, model = (
        tmp_path / "out",
        settings(tmp_path / "work"),
        load_config(ModelConfig, MODEL),
    )
    shipped = Path(dim.__file__).parent / "tiny" / "weights"
    for part in ("understanding", "autoencoder"):
        shutil.copytree(shipped / part, out / part)
    told: list[tuple[str, int, int]] = []

    def progress(name: str, step: int, steps: int, loss: float) -> None:
        told.append((name, step, steps))

    report = build(config, model, out, ["painter"], progress)["painter"]
    assert report["held_out"].keys() == {"objects", "background"}
    assert report["command"] == "dim tiny build --part painter"
    assert told[-1] == ("painter", 3, 3)
    lines = [json.loads(line) for line in (out / "logs" / "painter.jsonl").open()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[0]["learning_rate"] == pytest.approx(2e-3)  # after warming up for one step
    assert all(tensor.dtype == torch.float16 for tensor in load_file(*weights_of(out)).values())

    trained = {
        "painter": model.painter.model_copy(update={"weights": str(out / "painter")}),
        "connector": model.connector.model_copy(
            update={"weights": str(out / "painter" / "connector.safetensors")}
        ),
    }
    (picture,) = build_model(model.model_copy(update=trained)).generate(["a red circle"], steps=1)
    assert picture.size == (64, 64)

    before = weights_of(out)[0].read_bytes()
    shutil.rmtree(out / "painter")
    build(config, model, out, ["painter"], progress)  # a finished stage is not run again
    assert weights_of(out)[0].read_bytes() == before


def weights_of(out: Path) -> list[Path]:
    return list((out / "painter").glob("diffusion*.safetensors"))


def test_an_unknown_part_is_named_with_those_that_there_are(tmp_path: Path) -> None:
    model = load_config(ModelConfig, MODEL)
    with pytest.raises(InputError, match="unknown part brush; there are autoencoder, .*, painter"):
        build(settings(tmp_path), model, tmp_path, ["brush"], lambda *told: None)
    assert list(PARTS) == ["autoencoder", "understanding", "binding", "painter", "editor"]


def test_the_shipped_editor_edits(tmp_path: Path) -> None:
    at = {
        "painter": "package:tiny/editor",
        "connector": "package:tiny/editor/connector.safetensors",
    }
    weights = [f"{part}.weights={where}" for part, where in at.items()]
    editor = build_model(load_config(ModelConfig, MODEL, weights))
    edits = [
        tabletop.sample_edit(
            np.random.default_rng(seed), kinds=DEMO_KINDS, objects=(2, 3), referential=0, outlines=0
        )
        for seed in range(100, 116)
    ]
    made = editor.edit(
        [tabletop.render(edit.source, (64, 64)) for edit in edits],
        [edit.instruction for edit in edits],
        blueprints=[edit.blueprint.render() for edit in edits],
        seeds=range(16),
    )
    exact = [tabletop.exact(m.image, edit.target) for m, edit in zip(made, edits, strict=True)]
    assert sum(exact) >= 6  # the demo measures 53 %; chance is nothing


def test_an_editor_is_what_a_finished_demo_leaves(tmp_path: Path) -> None:
    config = settings(tmp_path)
    with pytest.raises(InputError, match="trained by no finished stage: run `dim demo` first"):
        build(config, load_config(ModelConfig, MODEL), tmp_path, ["editor"], lambda *told: None)
