"""Small tabletop data sets in the form that the data jobs leave behind."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray.train
import ray.train.torch
import torch
from PIL import Image

from dim import records, tabletop

Rows = list[dict[str, Any]]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def edit_rows(count: int, seed: int = 0) -> Rows:
    rows = []
    for index in range(count):
        edit = tabletop.sample_edit(np.random.default_rng([seed, index]))
        origin = {"kind": edit.kind, "target_scene": edit.target.to_json()}
        rows.append(
            {
                "id": f"edit-{index}",
                "index": index,
                "source": "tabletop",
                "instruction": edit.instruction,
                "blueprint": edit.blueprint.render(),
                "image": png(tabletop.render(edit.source, 64)),
                "image_target": png(tabletop.render(edit.target, 64)),
                "provenance": json.dumps({"tabletop": origin}),
            }
        )
    return rows


def t2i_rows(count: int, seed: int = 0) -> Rows:
    rows = []
    for index in range(count):
        scene = tabletop.sample_scene(np.random.default_rng([seed, index]))
        rows.append(
            {
                "id": f"image-{index}",
                "index": index,
                "source": "tabletop",
                "caption": tabletop.caption(scene),
                "image": png(tabletop.render(scene, 64)),
                "provenance": json.dumps({"tabletop": {"scene": scene.to_json()}}),
            }
        )
    return rows


def write_dataset(folder: Path, rows: Rows, schema: pa.Schema) -> str:
    """Two shards and a manifest, as a data job leaves them."""
    files = []
    (folder / "data").mkdir(parents=True)
    half = (len(rows) + 1) // 2
    for number, part in enumerate([rows[:half], rows[half:]]):
        path = folder / "data" / f"part-{number:05d}.parquet"
        pq.write_table(pa.Table.from_pylist(part, schema), path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        files.append({"path": f"data/{path.name}", "rows": len(part), "sha256": digest})
    (folder / "manifest.json").write_text(json.dumps({"files": files}), encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="session")
def edit_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("edit") / "out", edit_rows(20), records.EDIT)


@pytest.fixture(scope="session")
def held_out_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    rows = edit_rows(5, seed=9)
    return write_dataset(tmp_path_factory.mktemp("held-out") / "out", rows, records.EDIT)


@pytest.fixture(scope="session")
def t2i_data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("t2i") / "out", t2i_rows(12), records.T2I)


@pytest.fixture
def make_dataset(tmp_path: Path) -> Callable[[str, Rows, pa.Schema], str]:
    """``make_dataset(name, rows, schema)``: a data set of one's own."""
    return lambda name, rows, schema: write_dataset(tmp_path / name, rows, schema)


class Alone:
    """Stands in for Ray Train around one worker in this process, and keeps what it reports."""

    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []
        self.folder = Path()  # what is reported is kept here, one folder for each run

    @property
    def checkpoint(self) -> ray.train.Checkpoint | None:
        """The latest of the run."""
        kept = sorted(self.folder.glob("step-*"))
        return ray.train.Checkpoint.from_directory(kept[-1]) if kept else None

    def get_world_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return 1

    def report(
        self,
        metrics: dict[str, Any],
        checkpoint: ray.train.Checkpoint,
        checkpoint_dir_name: str,
    ) -> None:
        self.reports.append(metrics)
        checkpoint.to_directory(self.folder / checkpoint_dir_name)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Lets ``train_loop_per_worker`` run in this process, as the only worker, without a Ray."""
    stand_in = Alone()
    monkeypatch.setattr(ray.train, "get_context", lambda: stand_in)
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: stand_in.checkpoint)
    monkeypatch.setattr(ray.train, "report", stand_in.report)
    monkeypatch.setattr(ray.train.torch, "get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(ray.train.torch, "prepare_model", lambda model, **options: model)
    return stand_in


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all training tests."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow') / 'mlflow.db'}"
