from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dim.errors import ConfigError
from infra.tracking import TrackingError
from pipelines.ingest import IngestConfig
from training.stage import StageConfig
from workflows.run import log_of
from workflows.workflow import load_workflow, place, programs_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
STEPS: dict[str, Any] = {
    "raw": {"run": "ingest", "with": {"tabletop": "${values.pairs}", "kinds": "${values.kinds}"}},
    "edit": {
        "run": "edit",
        "file": "edit.yaml",
        "with": {"raw": "${raw}", "designer": "oracle", "filters": {"min_side": 16}},
    },
    "stage": {
        "run": "train",
        "with": {
            "stage": "edit2",
            "init": "${here}/tiny.yaml",
            "data": ["${edit}"],
            "steps": 3,
            "batch_size": 4,
            "learning_rate": 0.1,
        },
    },
    "score": {"run": "evaluate", "with": {"model": "${stage.model}", "data": "${edit}"}},
}
VALUES = {"pairs": 7, "kinds": ["add", "remove"]}


def written(folder: Path, **changes: Any) -> Path:
    values = {"out": str(folder / "out"), "values": VALUES, "steps": STEPS} | changes
    (folder / "edit.yaml").write_text("filters: {min_side: 32, min_entropy: null}\nworkers: 2\n")
    file = folder / "workflow.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def test_every_step_has_its_settings_in_full(tmp_path: Path) -> None:
    loaded = load_workflow(written(tmp_path))
    out = tmp_path / "out"
    raw, edit, stage, score = (loaded.steps[name].config for name in STEPS)
    assert isinstance(raw, IngestConfig) and isinstance(stage, StageConfig)
    assert (raw.tabletop, raw.kinds) == (7, ("add", "remove"))
    assert raw.out == str(out / "data" / "raw") == place(loaded.config, "raw")
    assert edit.raw == raw.out and edit.workers == 2  # type: ignore[attr-defined]
    # A section of the file keeps what the workflow does not change of it.
    assert (edit.filters.min_side, edit.filters.min_entropy) == (16, None)  # type: ignore[attr-defined]
    assert stage.init == str(tmp_path / "tiny.yaml")
    assert list(stage.uris) == [edit.out]  # type: ignore[attr-defined]
    assert score.model == str(out / "training" / "stage" / "model")  # type: ignore[attr-defined]
    assert loaded.tracking.uri == f"sqlite:///{out / 'mlflow.db'}" == stage.tracking.uri
    inputs = {name: set(step.inputs) for name, step in loaded.steps.items()}
    assert inputs == {"raw": set(), "edit": {"raw"}, "stage": {"edit"}, "score": {"stage", "edit"}}
    assert loaded.following("edit") == {"stage", "score"} and not loaded.following("score")


def test_values_and_settings_are_changed_by_name(tmp_path: Path) -> None:
    loaded = load_workflow(written(tmp_path), ["pairs=9", "steps.stage.with.steps=5"])
    assert loaded.steps["raw"].config.tabletop == 9  # type: ignore[attr-defined]
    assert loaded.steps["stage"].config.steps == 5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("steps", "overrides", "said"),
    [
        ({"a": {"run": "ingst"}}, [], "no program 'ingst' (did you mean 'ingest'?)"),
        ({"A": {"run": "ingest"}}, [], "a step cannot be called 'A'"),
        ({"out": {"run": "ingest"}}, [], "a step cannot be called 'out'"),
        (
            {"a": {"run": "edit", "with": {"raw": "${rw}"}}, "raw": {"run": "t2i"}},
            [],
            "step 'a' needs 'rw', which is no step (did you mean 'raw'?)",
        ),
        ({"a": {"run": "ingest", "after": ["b"]}, "b": {"run": "ingest", "after": ["a"]}}, [],
         "steps wait for one another"),
        ({"a": {"run": "ingest", "with": {"tabletop": "${values.pears}"}}}, [],
         "step 'a': no value 'pears' (did you mean 'pairs'?)"),
        ({"a": {"run": "ingest", "with": {"tabletp": 3}}}, [],
         "step 'a': unknown key 'tabletp' (did you mean 'tabletop'?)"),
        ({"a": {"run": "ingest", "with": {"tabletop": "many"}}}, [], "step 'a': key 'tabletop'"),
        ({"a": {"run": "ingest", "file": "nowhere.yaml"}}, [], "nowhere.yaml"),
        ({"a": {"run": "ingest", "with": {"tabletop": 3}},
          "b": {"run": "edit", "with": {"raw": "${a.model}", "designer": "oracle"}}}, [],
         "${a.model}: 'a' has no parts"),
        (STEPS, ["pears=3"], "it has no value 'pears' (did you mean 'pairs'?)"),
        (STEPS, ["tracing.uri=x"], "it has no value 'tracing' (did you mean 'tracking'?)"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_before_anything_starts(
    tmp_path: Path, steps: dict[str, Any], overrides: list[str], said: str
) -> None:
    with pytest.raises(ConfigError) as error:
        load_workflow(written(tmp_path, steps=steps), overrides)
    assert said in str(error.value) and str(tmp_path) in str(error.value)


def test_programs_are_found_before_settings_are_read(tmp_path: Path) -> None:
    assert programs_of(written(tmp_path)) == {"ingest", "edit", "train", "evaluate"}
    assert "rollout" in programs_of("configs/demo.yaml")  # of the package, wherever one stands
    for steps in (None, [], {"a": None, "b": {"run": ["ingest"]}, "c": {"run": "ingst"}}):
        assert programs_of(written(tmp_path, steps=steps)) == set()  # what is wrong is told later
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        programs_of(tmp_path / "nowhere.yaml")


def test_a_workflow_in_a_bucket_needs_a_tracker_somewhere(
    tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    out = f"{s3}/run"
    with pytest.raises(TrackingError, match=r"set tracking\.uri or MLFLOW_TRACKING_URI"):
        load_workflow(written(tmp_path, out=out))
    loaded = load_workflow(written(tmp_path, out=out), ["tracking.uri=http://mlflow:5000"])
    assert loaded.steps["edit"].config.raw == f"{out}/data/raw"  # type: ignore[attr-defined]
    assert log_of(loaded, "edit") == Path("runs/run/steps/edit.log")


def test_the_demo_is_a_workflow(tmp_path: Path) -> None:
    demo = load_workflow(CONFIGS / "demo.yaml", [f"out={tmp_path}", "pairs=40", "size=32"])
    pairs = demo.steps["pairs"].config
    assert pairs.filters.min_side == 32 and pairs.filters.min_entropy is None  # type: ignore[attr-defined]
    seeds = [demo.steps[f"raw-{name}"].config.seed for name in ("pairs", "held-out", "images")]  # type: ignore[attr-defined]
    assert len(set(seeds)) == 3  # no held-out scene is one of those trained on
    # People wait for the page, so the data jobs wait for it; training, for both cores.
    assert demo.steps["raw-pairs"].inputs == ("page",)
    assert set(demo.steps["t2i"].inputs) == {"images", "pairs", "held-out"}
    assert demo.steps["serve"].inputs == ("page", "edit2", "evaluate")


def test_the_documented_example_could_be_run(tmp_path: Path) -> None:
    page = (CONFIGS.parent / "docs" / "workflows.md").read_text()
    text = page.partition("```yaml\n")[2].partition("```")[0]
    file = tmp_path / "loop.yaml"
    file.write_text(text.replace("s3://bucket", str(tmp_path)))
    for name in ("data-edit.yaml", "dim-4.6b-edit2.yaml"):
        (tmp_path / name).write_text((CONFIGS / name).read_text())
    loaded = load_workflow(file, ["designer=replay:answers.jsonl", "steps.edit2.with.epochs=20"])
    assert loaded.steps["edit2"].config.epochs == 20  # type: ignore[attr-defined]
    assert loaded.steps["edit"].config.designer == "replay:answers.jsonl"  # type: ignore[attr-defined]
    assert loaded.steps["edit2"].config.tracking.experiment == "dim"  # type: ignore[attr-defined]
    assert loaded.following("edit") == {"edit2", "score", "release"}
