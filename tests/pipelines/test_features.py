"""The features job on a real local Ray: outputs, reruns, refusals, and the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import yaml

from dim import cli, records
from dim import model as models
from dim.config import dump_config
from dim.errors import CheckpointError, ConfigError, InputError
from infra.capacity import CapacityError
from infra.samples import open_features
from infra.storage import open_store
from pipelines import features
from pipelines.features import FeaturesConfig
from pipelines.outputs.manifest import MARKER, NAME, Manifest
from pipelines.outputs.verify import verify
from tests.datasets import edit_rows, t2i_rows
from tests.pipelines.finished import finish

pytestmark = pytest.mark.usefixtures("ray_cluster")

COUNT = 20
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Edits in three files; one has a broken image and one no blueprint."""
    rows = edit_rows(COUNT)
    rows[3]["image"] = b"no image"
    rows[9]["blueprint"] = None
    folder = tmp_path_factory.mktemp("plain") / "out"
    finish(open_store(str(folder)), rows)
    return str(folder)


@pytest.fixture(scope="module")
def settings(
    plain: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    model = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(tiny_model_dir, model)
    return {
        "data": plain,
        "model": str(model),
        "texts": ("instruction", "blueprint"),
        "encode_batch": 4,
        "target_file_mb": 0.5,
        "row_group_mb": 0.01,
        "cpus_per_worker": 0.5,
    }


@pytest.fixture(scope="module")
def made(
    ray_cluster: None, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[FeaturesConfig, Manifest]:
    config = FeaturesConfig(out=str(tmp_path_factory.mktemp("made") / "out"), **settings)
    return config, features.run(config)


def table_of(uri: str) -> pa.Table:
    store = open_store(uri)
    return pa.concat_tables(
        [pq.read_table(pa.BufferReader(store.read(name))) for name, _ in store.list("data")]
    )


def test_every_record_is_accounted_for(made: tuple[FeaturesConfig, Manifest]) -> None:
    config, manifest = made
    counts = manifest.counts
    assert (counts.input, counts.kept, counts.rejected, counts.failed) == (COUNT, 18, 1, 1)
    assert counts.by_reason == {"features.text_missing": 1}
    assert verify(config.out).problems == []
    table = table_of(config.out)
    assert table["index"].to_pylist() == [n for n in range(COUNT) if n not in (3, 9)]
    assert records.kind_of(table.schema) == "edit_features"
    store = open_store(config.out)
    assert len(store.list("data")) > 1
    with store.open_parquet(manifest.files[0].path) as parquet:
        assert parquet.metadata.num_row_groups == parquet.metadata.num_rows
    assert not store.exists("ranges")


def test_the_same_whatever_the_parallelism(
    made: tuple[FeaturesConfig, Manifest], settings: dict[str, Any], s3: str
) -> None:
    other = features.run(FeaturesConfig(out=f"{s3}/features", workers=3, **settings))
    assert other.files == made[1].files
    shards = open_features([f"{s3}/features"], ["blueprint"], edits=True)
    assert shards.rows == 18


def test_what_no_node_has_is_not_waited_for(
    ray_cluster: None, settings: dict[str, Any], tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    config = FeaturesConfig(out=out, gpus_per_worker=1, nodes_wait_s=1, workers=2, **settings)
    with pytest.raises(CapacityError, match=r"wants a worker of {CPU: 0.5, GPU: 1}, and no node"):
        features.run(config)
    assert not open_store(out).is_file(NAME)


def test_a_finished_output_is_left_as_it_is(
    made: tuple[FeaturesConfig, Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_work(*arguments: object) -> None:
        raise AssertionError("the features were made again")

    config, manifest = made
    monkeypatch.setattr(features, "encode", no_work)
    assert features.run(config) == manifest


def test_other_weights_do_not_pass_for_the_same_output(
    made: tuple[FeaturesConfig, Manifest], tmp_path: Path
) -> None:
    config, _ = made
    model = Path(config.model)
    other = models.load(model)
    other.autoencoder.network.register_to_config(scaling_factor=0.5)
    model.rename(tmp_path / "before")
    try:
        other.save(model)
        with pytest.raises(InputError, match=r"made otherwise \(input preparation.autoencoder was"):
            features.run(config)
    finally:
        shutil.rmtree(model, ignore_errors=True)
        (tmp_path / "before").rename(model)


def test_a_driver_that_was_killed_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    plain, out = str(tmp_path / "plain"), str(tmp_path / "out")
    finish(open_store(plain), edit_rows(40), rows_per_file=1)
    chosen = {"data": plain, "texts": ("blueprint",), "rows_per_file": 1}
    config = FeaturesConfig(out=out, **(settings | chosen))
    undisturbed = features.run(config.model_copy(update={"out": str(tmp_path / "whole")}))

    file = tmp_path / "job.yaml"
    file.write_text(yaml.safe_dump(dump_config(config)))
    command = [sys.executable, "-m", "pipelines.features", "--out", out, "--config", str(file)]
    address = ray.get_runtime_context().gcs_address
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "RAY_ADDRESS": address}, stderr=subprocess.PIPE
    )
    store, deadline = open_store(out), time.monotonic() + 200
    while len(store.list("ranges", suffix=".json")) < 3 and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    time.sleep(2)  # until Ray has ended the job's workers
    receipts = [json.loads(store.read(name)) for name, _ in store.list("ranges", suffix=".json")]
    done = [Path(out, file["path"]) for receipt in receipts for file in receipt["files"]]
    assert 3 <= len(done) < 40
    assert store.exists(MARKER) and not store.exists("manifest.json")
    before = [path.stat() for path in done]

    assert features.run(config) == undisturbed.model_copy(update={"config": dump_config(config)})
    after = [path.stat() for path in done]
    assert [(one.st_ino, one.st_mtime_ns) for one in after] == [
        (one.st_ino, one.st_mtime_ns) for one in before
    ]
    assert verify(out).problems == []
    assert not store.exists("ranges") and not store.exists(MARKER)


def test_images_and_captions(settings: dict[str, Any], tmp_path: Path) -> None:
    finish(open_store(str(tmp_path / "plain")), t2i_rows(5), records.T2I)
    chosen = {**settings, "data": str(tmp_path / "plain"), "texts": None, "encoding": "int8"}
    config = FeaturesConfig(out=str(tmp_path / "out"), **chosen)
    assert features.run(config).counts.kept == 5
    shards = open_features([config.out], ["caption"], edits=False)
    assert shards.rows == 5 and shards.encoding == "int8" and not shards.edits


@pytest.mark.parametrize(
    ("changes", "kind", "complaint"),
    [
        ({"data": "gone"}, InputError, "the input gone does not exist"),
        ({"texts": ("caption",)}, InputError, "holds edit records, which have no caption"),
        ({"model": "gone"}, CheckpointError, "gone is neither a model folder nor a model YAML"),
    ],
)
def test_mistakes_are_found_before_anything_is_touched(
    settings: dict[str, Any],
    tmp_path: Path,
    changes: dict[str, Any],
    kind: type[Exception],
    complaint: str,
) -> None:
    with pytest.raises(kind, match=complaint) as caught:
        features.run(FeaturesConfig(out=str(tmp_path / "out"), **{**settings, **changes}))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_view_that_does_not_go_with_model_or_records_is_refused(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(settings["model"], tmp_path / "region")
    file = tmp_path / "region" / "dim.json"
    description = json.loads(file.read_text())
    description["config"]["understanding"]["vlm_view"] = "region"
    file.write_text(json.dumps(description))
    chosen = settings | {"model": str(tmp_path / "region"), "out": str(tmp_path / "out")}
    with pytest.raises(ConfigError, match="region was trained with vlm_view: region"):
        features.run(FeaturesConfig(**chosen))
    finish(open_store(str(tmp_path / "plain")), t2i_rows(1), records.T2I)
    images = {"data": str(tmp_path / "plain"), "texts": None, "vlm_view": "region"}
    with pytest.raises(InputError, match="sees no image of t2i records"):
        features.run(FeaturesConfig(**(chosen | images)))
    assert not (tmp_path / "out").exists()


def test_the_command_line_takes_a_stage(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def dim(*arguments: str) -> tuple[int, str, str]:
        code = cli.execute(cli.root(), ["data", "features", *arguments], prog_name="dim")
        said = capsys.readouterr()
        return code, said.out, said.err

    stage = {
        "stage": "edit2",
        "init": settings["model"],
        "data": [settings["data"]],
        "out": "never",
        "text_mix": {"blueprint": 1, "instruction": 1},
        "buckets": True,
        "vlm_view": "region",
        "steps": 1,
        "batch_size": 1,
        "learning_rate": 1,
    }
    file, out = tmp_path / "stage.yaml", str(tmp_path / "out")
    file.write_text(yaml.safe_dump(stage))
    arguments = ("--stage", str(file), "--out", out, "encoding=int8", "cpus_per_worker=0.5")
    code, said, _ = dim(*arguments)
    assert code == 0 and "20 records: 18 kept, 1 rejected, 1 failed" in said
    assert "blueprint_error: 0." in said and "instruction_error: 0." in said
    shards = open_features([out], ["blueprint", "instruction"], edits=True)
    assert shards.rows == 18
    assert (shards.preparation.cell, shards.preparation.vlm_view) == (16, "region")

    code, _, error = dim("--out", out)
    assert code == 2 and "missing key 'data'" in error
    file.write_text(yaml.safe_dump({**stage, "data": ["a", "b"]}))
    code, _, error = dim("--stage", str(file), "--out", out)
    assert code == 2 and "trains on 2 data sets: give one of them as --data" in error
