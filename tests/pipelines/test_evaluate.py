"""What is counted of painted edits; painting itself is tested with the demo."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from mlflow.entities import Run
from PIL import Image

from dim import tabletop
from dim.errors import InputError
from dim.images import encode_png
from dim.records import EDIT
from infra.storage import open_store
from infra.tracking import Run as Tracked
from infra.tracking import TrackingError, open_client
from pipelines import evaluate
from pipelines.evaluate import EvaluateConfig, Evaluation, summary
from pipelines.job import TrackingConfig
from pipelines.outputs.shards import Shards
from pipelines.stages.paint import BLUEPRINT, PAINTED, PaintEdits
from tests.datasets import edit_rows
from tests.pipelines.finished import finish


def painted(exact: bool, strict: bool, referential: bool = False) -> dict[str, Any]:
    known = {"id": "x", "way": BLUEPRINT, "kind": "remove", "referential": referential}
    return known | {"exact": exact, "strict": strict}


ROWS = [painted(True, True), painted(True, False), painted(False, False), painted(True, True, True)]
EVALUATION = Evaluation(pa.Table.from_pylist(ROWS, PAINTED))


def test_strictly_exact_edits_are_counted_beside_exact_ones() -> None:
    share = EVALUATION.share(BLUEPRINT, referential=False)
    assert (share.exact, share.strict, share.count) == (2, 1, 3)
    metrics = EVALUATION.metrics()
    assert metrics.pop("exact/blueprint/low") < 3 / 4 < metrics.pop("exact/blueprint/high")
    bounds = [metrics.pop(f"exact/blueprint/{part}/{end}") for part in ("direct", "referential")
              for end in ("low", "high")]  # fmt: skip
    assert bounds == pytest.approx([0.2077, 0.9385, 0.2065, 1], abs=1e-3)  # 2 of 3, 1 of 1
    assert metrics == pytest.approx(
        {
            "exact/blueprint": 3 / 4,
            "exact/blueprint/direct": 2 / 3,
            "exact/blueprint/referential": 1,
            "strict/blueprint": 2 / 4,
            "strict/blueprint/direct": 1 / 3,
            "strict/blueprint/referential": 1,
        }
    )


def test_both_figures_are_shown() -> None:
    assert summary(EVALUATION) == [
        ("direct instructions", ["67% of 3 (33% strictly)"]),
        ("referential instructions", ["100% of 1 (100% strictly)"]),
        ("direct: remove", ["67% of 3 (33% strictly)"]),
    ]
    none = EVALUATION.share(BLUEPRINT, kind="add")
    assert (none.accuracy, none.strict_accuracy, none.interval) == (0, 0, (0, 1))


def test_an_edit_is_judged_by_both_of_its_scenes(tiny_model_dir: Path) -> None:
    scene = tabletop.sample_scene(np.random.default_rng(3))
    target = replace(scene, objects=scene.objects[1:])
    truth = {"kind": "remove", "referential": False}
    truth |= {
        "source_scene": json.loads(scene.to_json()),
        "target_scene": json.loads(target.to_json()),
    }
    row = {"id": "a", "instruction": "remove it", "provenance": json.dumps({"tabletop": truth})}
    row |= {"image": b"", "image_target": b""}
    right = tabletop.render(target, 64)
    faded = Image.blend(right, Image.new("RGB", right.size, "white"), 0.15)
    judge = PaintEdits(str(tiny_model_dir), (), None, None)._judge
    for image, text, found in (
        (right, "a text", (True, True)),
        (faded, "a text", (True, False)),
        (tabletop.render(scene, 64), "a text", (False, False)),
        (right, None, (False, False)),  # what has no blueprint is not painted from one
    ):
        judged = judge(row, "instruction", text, encode_png(image))
        assert (judged["exact"], judged["strict"]) == found


def tabletop_shards(out: str) -> None:
    rows = edit_rows(2)
    for row in rows:
        row["provenance"] = json.dumps({"tabletop": {}})
    finish(open_store(out), rows)


def test_an_evaluation_is_logged_where_it_is_asked_for(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, uri = str(tmp_path / "data"), f"sqlite:///{tmp_path}/mlflow.db"
    tabletop_shards(data)
    monkeypatch.setattr(evaluate, "connect", lambda wait: False)
    monkeypatch.setattr(evaluate, "_painted", lambda *_: EVALUATION)
    client = open_client(uri)

    def runs(experiment: str) -> list[Run]:
        found = client.get_experiment_by_name(experiment)
        return [] if found is None else list(client.search_runs([found.experiment_id]))

    config = EvaluateConfig(model=str(tiny_model_dir), data=data, steps=3)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    evaluate.run(config)
    assert runs("dim-data") == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    evaluate.run(config)
    (run,) = runs("dim-data")
    assert run.info.run_name == "evaluate" and run.info.status == "FINISHED"
    assert run.data.metrics.items() >= EVALUATION.metrics().items()
    assert run.data.params["steps"] == "3" and run.data.params["data"] == data
    (read,) = run.inputs.dataset_inputs
    assert json.loads(read.dataset.source)["uri"] == data

    def refuse(*_: object) -> None:
        raise TrackingError("the store is down")

    kept = config.model_copy(update={"out": str(tmp_path / "out")})
    with monkeypatch.context() as patched:
        patched.setattr(Tracked, "log_metrics", refuse)
        with pytest.raises(TrackingError):
            evaluate.run(kept)

    def fail(*_: object) -> Evaluation:
        raise InputError("no such thing")

    monkeypatch.setattr(evaluate, "_painted", fail)
    assert evaluate.run(kept).metrics() == EVALUATION.metrics()  # logged, and not painted again
    states = [run.info.status for run in runs("dim-data")]
    assert states == ["FINISHED", "FAILED", "FINISHED"]
    named = TrackingConfig(uri=uri, experiment="mine")
    with pytest.raises(InputError):
        evaluate.run(config.model_copy(update={"tracking": named}))
    assert [run.info.status for run in runs("mine")] == ["FAILED"]


def test_what_was_evaluated_is_not_painted_again(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AtWorkError(Exception):
        """Something would be painted."""

    def paint(*_: object) -> None:
        raise AtWorkError

    monkeypatch.setattr(evaluate, "connect", paint)
    model, data, out = tmp_path / "model", str(tmp_path / "data"), str(tmp_path / "out")
    shutil.copytree(tiny_model_dir, model)
    tabletop_shards(data)
    config = EvaluateConfig(model=str(model), data=data, out=out, steps=3)
    with pytest.raises(AtWorkError):
        evaluate.run(config)
    of = evaluate._what_is_evaluated(config, str(model), Shards.open(data, EDIT))
    evaluate.write_painted(EVALUATION, out, of)
    evaluate.write_numbers(EVALUATION, out)
    assert evaluate.run(config).metrics() == EVALUATION.metrics()
    other = config.model_copy(update={"steps": 4})
    (tmp_path / "moved").symlink_to(data)
    moved = config.model_copy(update={"data": str(tmp_path / "moved"), "workers": 9})
    assert evaluate.run(moved).metrics() == EVALUATION.metrics()
    for again in (lambda: evaluate.run(other), lambda: evaluate.run(config, overwrite=True)):
        with pytest.raises(AtWorkError):
            again()
    weights = next(model.rglob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(AtWorkError):
        evaluate.run(config)
