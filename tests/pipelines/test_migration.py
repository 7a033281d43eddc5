"""Outputs of the first version, in ``version_1``: what it made is read, and found to be finished.

Made by the program before ranges had receipts: ``raw`` are four pairs of the tabletop, ``edit`` is
DIM-Edit of them, and every kind of record in them has schema version 1.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pytest

from dim import records
from infra.samples import open_images
from infra.storage import open_dataset, open_store
from pipelines import edit, ingest
from pipelines.edit import EditConfig
from pipelines.filter import FilterPairsConfig
from pipelines.filter import run as run_filter
from pipelines.filters import PairRules
from pipelines.ingest import IngestConfig
from pipelines.outputs import manifest as manifests
from pipelines.outputs.shards import Shards
from pipelines.outputs.verify import verify

pytestmark = pytest.mark.usefixtures("ray_cluster")

DRAWN = dict.fromkeys(("min_entropy", "min_sharpness", "max_text_area"))
TABLE = PairRules(min_side=32, min_changed=0.0005, min_ssim=-1, max_shift=None, **DRAWN)
RAW = IngestConfig(tabletop=4, size=48, out="raw", rows_per_file=3, seed=3)
EDIT = EditConfig(raw="raw", out="edit", designer="oracle", rows_per_file=3, filters=TABLE)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of them, as the current folder."""
    for name in ("raw", "edit"):
        shutil.copytree(Path(__file__).parent / "version_1" / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(("name", "kind"), [("raw", records.RAW_PAIR), ("edit", records.EDIT)])
def test_they_are_read(name: str, kind: pa.Schema) -> None:
    assert verify(name).problems == []
    shards = Shards.open(name, kind)
    assert shards.rows == 4 and records.version_of(shards.schema) == 1
    assert open_dataset(name).to_table()["index"].to_pylist() == [0, 1, 2, 3]
    assert open_images([name], ["image", "instruction"]).rows == 4


def test_they_are_found_to_be_finished(folder: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert ingest.run(RAW) == manifests.read(open_store("raw"))
    assert edit.run(EDIT) == manifests.read(open_store("edit"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_other_jobs_go_on_from_them(folder: Path) -> None:
    made = run_filter(FilterPairsConfig(raw="raw", out="good", filters=TABLE))
    assert made.counts.kept == 4 and verify("good").problems == []
    before = open_dataset("edit").to_table()
    edit.run(EDIT, overwrite=True)
    assert verify("edit").problems == []
    after = open_dataset("edit").to_table()
    assert after.drop_columns("measures").equals(before.drop_columns("measures"))
    # Measures are of the same names, and of other last digits than those of the earlier code.
    for new, old in zip(*(table["measures"].to_pylist() for table in (after, before)), strict=True):
        assert {each["name"]: each["value"] for each in new} == pytest.approx(
            {each["name"]: each["value"] for each in old}, rel=0.02, abs=0.01
        )
    assert not (folder / "edit/data/part-00000.parquet").exists()
