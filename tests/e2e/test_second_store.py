"""The whole chain on an S3 server that is not moto: one that checks signatures and takes no marker.

It runs in a process and a Ray of its own, with nothing in the environment but what AWS's own tools
would need; how this store wants its uploads is for the program to know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import boto3
import pytest

from dim import model
from dim.config import validate_config
from infra import storage
from pipelines import edit, features, ingest
from pipelines.edit import EditConfig
from pipelines.features import FeaturesConfig
from pipelines.filters import PairRules
from pipelines.ingest import IngestConfig
from pipelines.outputs import export
from pipelines.outputs.export import ExportConfig
from pipelines.outputs.verify import verify
from training import train
from training.stage import StageConfig

ROOT = Path(__file__).resolve().parents[2]
PAIRS = 12


def chain(bucket: str, tiny: str, scratch: str) -> None:
    """From pairs to a trained model and an export, all in ``bucket``."""
    raw, edits, states = (f"{bucket}/{name}" for name in ("raw", "edit", "features"))
    storage.upload_folder(tiny, f"{bucket}/tiny")
    drawn = IngestConfig(tabletop=PAIRS, out=raw, rows_per_file=8)
    ingest.run(drawn)
    rules = PairRules(min_side=32, min_changed=0.0005, min_ssim=-1)
    edit.run(EditConfig(raw=raw, out=edits, designer="oracle", filters=rules))
    features.run(FeaturesConfig(data=edits, model=f"{bucket}/tiny", out=states, encode_batch=4))
    stage = {
        "stage": "edit2",
        "init": f"{bucket}/tiny",
        "data": [states],
        "out": f"{bucket}/run",
        "steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "checkpoint_every": 1,
        "keep_checkpoints": 1,
        "tracking": {"uri": f"sqlite:///{scratch}/mlflow.db", "experiment": "test"},
    }
    config = validate_config(StageConfig, stage, where="test")
    trained = train.run(config)
    assert train.run(config) == trained  # which it knows from what lies in the store
    export.run(ExportConfig(data=edits, out=f"{bucket}/public"))
    # Replacing an output ends with deleting.
    ingest.run(drawn, overwrite=True)


@pytest.mark.slow
def test_from_pairs_to_a_trained_model_and_an_export(
    rclone_s3: str, rclone_endpoint: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    unset = ("AWS_REQUEST_CHECKSUM_CALCULATION", "MLFLOW_TRACKING_URI", "RAY_ADDRESS")
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    program = "import sys; from tests.e2e.test_second_store import chain; chain(*sys.argv[1:])"
    done = subprocess.run(
        [sys.executable, "-c", program, rclone_s3, tiny_model_dir, tmp_path],
        env=environment, cwd=ROOT, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr

    outputs = [f"{rclone_s3}/{name}" for name in ("raw", "edit", "features", "public")]
    assert [verify(output).problems for output in outputs] == [[]] * 4
    lines = storage.read_bytes(f"{rclone_s3}/public/tos_dataset_edit.jsonl").splitlines()
    assert len(lines) >= PAIRS - 2 and all(json.loads(line)["prompt"] for line in lines)
    storage.download_folder(f"{rclone_s3}/run/model", tmp_path / "model")
    assert model.load(tmp_path / "model").painter.takes_source
    client = boto3.Session().client("s3", endpoint_url=rclone_endpoint)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=rclone_s3.removeprefix("s3://"))
    keys = [found["Key"] for page in pages for found in page["Contents"]]
    assert not any(key.endswith("/") or "staging" in key for key in keys)
    checkpoints = {key.split("/")[2] for key in keys if key.startswith("run/checkpoints/step-")}
    assert checkpoints == {"step-00000003"}
