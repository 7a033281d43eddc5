"""The registry of a real MLflow, in a file and behind a server."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from dim.errors import InputError
from infra.registry import DESCRIPTION, Registry, describe, located, signature
from infra.runs import compare_table, find_runs, list_runs
from infra.tracking import Tracking, TrackingError, open_client


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/mlflow.db"


def model(folder: Path, weights: bytes = b"weights") -> str:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dim.json").write_text("{}")
    (folder / "painter.safetensors").write_bytes(weights)
    return str(folder)


def run_of(uri: str, name: str = "edit1", seed: int = 1, **metrics: float) -> str:
    with Tracking(uri, "dim-training").run(name, {"seed": seed, "same": 2}) as run:
        run.log_metrics(metrics)
        return run.id


def test_what_is_registered_is_found_by_alias_and_by_version(uri: str, tmp_path: Path) -> None:
    registry = Registry(uri)
    first, second = (model(tmp_path / name, name.encode()) for name in ("first", "second"))
    run = run_of(uri)
    one = registry.register("dim", first, run, metrics={"exact": 0.5}, tags={"stage": "edit1"})
    two = registry.register("dim", second, run, metrics={"exact": 0.25}, tags={})
    registry.point("edit1", one)
    registry.point("champion", one)
    registry.point("edit1", two)
    assert (one.version, two.version) == (1, 2) and one.metrics == {"exact": 0.5}
    assert located("models:/dim@edit1", uri) == second and located("models:/dim/1", uri) == first
    assert located("models:/dim@champion", uri) == first
    assert [each.aliases for each in registry.versions("dim")] == [("edit1",), ("champion",)]
    assert located("/a/folder") == "/a/folder"


def test_the_same_model_of_a_run_is_registered_once(uri: str, tmp_path: Path) -> None:
    registry, folder, run = Registry(uri), model(tmp_path / "model"), run_of(uri)
    made = [registry.register("dim", folder, run, metrics={}, tags={}) for _ in range(2)]
    assert [each.version for each in made] == [1, 1]
    assert registry.register("dim", folder, run_of(uri), metrics={}, tags={}).version == 2


def test_a_folder_that_was_trained_over_is_not_what_was_registered(
    uri: str, tmp_path: Path
) -> None:
    folder = model(tmp_path / "model")
    Registry(uri).register("dim", folder, run_of(uri), metrics={}, tags={})
    model(tmp_path / "model", b"others")
    with pytest.raises(TrackingError, match=r"models:/dim/1 is version 1, whose folder .* else by"):
        located("models:/dim/1", uri)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("models:/dim@edit9", r"no such version of dim \(it has @edit1, and versions up to 1\)"),
        ("models:/dim/7", r"no such version of dim \(it has @edit1"),
        ("models:/other@edit1", "has no registered model 'other'"),
        ("models:/it's@edit1", 'has no registered model "it\'s"'),
    ],
)
def test_what_is_not_there_is_said(address: str, said: str, uri: str, tmp_path: Path) -> None:
    registry = Registry(uri)
    made = registry.register("dim", model(tmp_path / "m"), run_of(uri), metrics={}, tags={})
    registry.point("edit1", made)
    with pytest.raises(TrackingError, match=said):
        located(address, uri)


@pytest.mark.parametrize("address", ["models:/dim", "models:/dim@", "models:/@a", "models:/dim/x"])
def test_an_address_of_another_form_is_refused(address: str, uri: str) -> None:
    with pytest.raises(InputError, match="is no model: models:/NAME@ALIAS"):
        located(address, uri)


def test_without_a_store_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(TrackingError, match="models:/dim@edit1: which MLflow"):
        located("models:/dim@edit1")


def test_the_folder_says_what_goes_in_and_out(tmp_path: Path) -> None:
    from mlflow.models import Model

    folder = model(tmp_path / "model")
    describe(folder, "r", signature(edits=True))
    loaded = Model.load(f"{folder}/{DESCRIPTION}")
    assert loaded.signature.inputs.input_names() == ["image", "instruction", "blueprint"]
    assert loaded.signature.outputs.input_names() == ["image"]
    assert yaml.safe_load((Path(folder) / DESCRIPTION).read_text())["flavors"].keys() == {"dim"}
    assert signature(edits=False).inputs.input_names() == ["prompt"]


def test_runs_are_listed_and_compared(uri: str) -> None:
    made = [run_of(uri, "t2i", loss=0.5), run_of(uri, "edit1", 7, loss=0.25, validation_exact=0.75)]
    client = open_client(uri)
    found = list_runs(client, uri, None, 20)
    assert [run.info.run_id for run in found] == made[::-1]
    assert [run.info.run_id for run in find_runs(found, [made[0][:20]])] == made[:1]
    table = compare_table(find_runs(found, made))
    assert [list(column.cells) for column in table.columns] == [
        ["seed", "loss", "validation_exact"],
        ["1", "0.5", ""],
        ["7", "0.25", "0.75"],
    ]
    for wanted, said in (("zzz", "no run begins with 'zzz'"), ("", "several runs begin with ''")):
        with pytest.raises(InputError, match=said):
            find_runs(found, [wanted])
    with pytest.raises(InputError, match="no experiment 'nope'"):
        list_runs(client, uri, "nope", 20)
