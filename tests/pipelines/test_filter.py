"""`dim data filter` on a real local Ray: what it keeps, and that later jobs can go on from it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image
from pydantic import ValidationError

from dim import cli, records
from dim.errors import InputError
from pipelines import ingest
from pipelines.filter import FilterImagesConfig, FilterPairsConfig, run
from pipelines.filters import PairRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.filters.verdicts import judge
from pipelines.ingest import IngestConfig
from pipelines.outputs import histograms
from pipelines.outputs.inspect import inspect
from pipelines.outputs.manifest import Manifest
from pipelines.outputs.verify import verify
from tests.pipelines.samples import write_pairs
from tests.pipelines.test_jobs import PLAN, check_output, rows_in

pytestmark = pytest.mark.usefixtures("ray_cluster")

RULES = PairRules(min_side=32)
REASONS = {"duplicate.exact": 1, "image.undecodable": 1, "pair.unchanged": 1}


@pytest.fixture(scope="module")
def raw(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs in files of six places: one cut off, one without an edit, one twice."""
    folder = tmp_path_factory.mktemp("pairs")
    path = write_pairs(folder, 20)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    half = (folder / "image" / "5_source.png").read_bytes()
    (folder / "image" / "5_source.png").write_bytes(half[: len(half) // 2])
    same = (folder / "image" / "8_source.png").read_bytes()
    (folder / "image" / "8_target.png").write_bytes(same)
    lines[17] = {**lines[2], "id": "again"}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out = folder / "raw"
    ingest.run(IngestConfig(pairs=str(path), out=str(out), rows_per_file=6))
    return out


def filter_pairs(raw: Path, out: Path, **more: object) -> Manifest:
    values = {"raw": str(raw), "out": str(out), "rows_per_file": 8, "filters": RULES, **more}
    return run(FilterPairsConfig.model_validate(values))


def dim(*arguments: str) -> int:
    """The exit code of the command ``dim``."""
    return cli.execute(cli.root(), arguments, prog_name="dim")


@pytest.fixture(scope="module")
def made(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Manifest]:
    out = tmp_path_factory.mktemp("filtered") / "out"
    return out, filter_pairs(raw, out)


def test_every_pair_is_accounted_for(raw: Path, made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    check_output(out, manifest)
    assert verify(str(out), images=True).problems == []
    assert (manifest.counts.input, manifest.counts.by_reason) == (20, REASONS)
    before = {row["id"]: row for row in rows_in(raw, "data")}
    kept, rejected = rows_in(out, "data"), rows_in(out, "rejected")
    for row in kept:
        assert {name: row[name] for name in records.RAW_PAIR.names} == before[row["id"]]
        assert {"ssim", "changed"} <= {measure["name"] for measure in row["measures"]}
    for row in rejected:
        same = ("index", "source", "instruction", "content_hash", "provenance")
        assert [row[name] for name in same] == [before[row["id"]][name] for name in same]
    twin = next(row for row in rejected if row["reason"] == "duplicate.exact")
    assert "the same as" in twin["detail"] and twin["measures"]


def test_how_the_input_is_cut_changes_nothing(
    raw: Path, made: tuple[Path, Manifest], tmp_path: Path
) -> None:
    _, manifest = made
    for size in (1, 7):
        assert filter_pairs(raw, tmp_path / str(size), batch_size=size).files == manifest.files


def test_a_finished_output_is_left_and_other_settings_are_refused(
    raw: Path, made: tuple[Path, Manifest]
) -> None:
    out, manifest = made
    written = (out / "manifest.json").stat().st_mtime_ns
    assert filter_pairs(raw, out, batch_size=3) == manifest
    assert (out / "manifest.json").stat().st_mtime_ns == written
    with pytest.raises(InputError, match=r"filters\.min_ssim was 0\.1 and is 0\.3"):
        filter_pairs(raw, out, filters={"min_side": 32, "min_ssim": 0.3})


def test_a_job_without_rules_for_duplicates_keeps_them(raw: Path, tmp_path: Path) -> None:
    rules = DuplicateRules(exact=False, max_distance=None)
    counts = filter_pairs(raw, tmp_path / "out", duplicates=rules).counts
    assert "duplicate.exact" not in counts.by_reason and counts.kept == 18


def test_what_an_earlier_data_set_has_goes(raw: Path, tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path / "pairs", 4)
    again = Image.open(tmp_path / "pairs/image/1_source.png")
    again.resize((90, 90)).save(tmp_path / "pairs/image/1_source.png")
    earlier = tmp_path / "earlier"
    ingest.run(IngestConfig(pairs=str(pairs), source="theirs", out=str(earlier), rows_per_file=3))
    rules = {"against": str(earlier)}
    out = tmp_path / "out"
    manifest = filter_pairs(raw, out, duplicates=rules)
    check_output(out, manifest)
    assert manifest.counts.by_reason == {**REASONS, "duplicate.exact": 4, "duplicate.near": 1}
    rejected = {row["id"]: row for row in rows_in(out, "rejected")}
    assert rejected["pair-0"]["detail"] == f"the same as 'pair-0' of {earlier}"
    assert rejected["again"]["detail"] == f"the same as 'pair-2' of {earlier}"
    assert f"differ from 'pair-1' of {earlier}" in rejected["pair-1"]["detail"]
    assert filter_pairs(raw, out, duplicates=rules) == manifest
    ingest.run(IngestConfig(pairs=str(pairs), out=str(earlier)), overwrite=True)
    with pytest.raises(InputError, match="made otherwise .*against"):
        filter_pairs(raw, out, duplicates=rules)
    single = str(tmp_path / "single")
    ingest.run(IngestConfig(tabletop_images=2, size=32, out=single))
    with pytest.raises(InputError, match="holds raw_image records, and raw_pair records are"):
        filter_pairs(raw, tmp_path / "other", duplicates={"against": single})


def test_the_tasks_that_filter_have_the_gpus(
    raw: Path, made: tuple[Path, Manifest], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = RULES.model_copy(update={"gpus": 0.25})
    assert filter_pairs(raw, made[0], filters=rules) == made[1]  # what comes out is the same

    def noted(*_: Any, **options: Any) -> Any:
        raise InputError(f"a task has {options['num_gpus']} of a GPU")

    monkeypatch.setattr("pipelines.filters.verdicts.gather", noted)
    with pytest.raises(InputError, match=r"has 0\.25 of a GPU"):
        filter_pairs(raw, tmp_path / "out", filters=rules)


def test_against_something_there_must_be_a_rule() -> None:
    with pytest.raises(ValidationError, match="no rule says what a duplicate is"):
        DuplicateRules(exact=False, max_distance=None, against="x")


def test_blueprints_are_written_for_what_is_left(
    made: tuple[Path, Manifest], tmp_path: Path
) -> None:
    out, manifest = made
    answers = tmp_path / "answers.jsonl"
    with answers.open("w") as file:
        for row in rows_in(out, "data"):
            plan = dataclasses.replace(PLAN, instruction=row["instruction"])
            file.write(json.dumps({"blueprint": plan.render()}) + "\n")
    edited = ["data", "edit", "--raw", str(out), "--designer", f"replay:{answers}"]
    assert dim(*edited, "--out", str(tmp_path / "edit"), "filters.min_side=32") == 0
    assert len(rows_in(tmp_path / "edit", "data")) == manifest.counts.kept


def test_the_page_shows_what_was_kept_and_what_was_not(made: tuple[Path, Manifest]) -> None:
    page = inspect(str(made[0]))
    names = {histogram.name for histogram in page.histograms}
    assert {"ssim", "changed"} <= names and set(page.rejected) == set(REASONS)
    assert page.no_pictures == ""


def test_the_manifest_says_how_what_was_measured_is_spread(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    counts: histograms.Counts = {}
    for folder in ("data", "rejected"):
        for path in (out / folder).iterdir():
            histograms.add(counts, histograms.count(pq.read_table(path)))
    assert manifest.measured == counts and counts["ssim"]["kept"]


def test_images_are_filtered_as_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = str(tmp_path / "raw")
    ingest.run(IngestConfig(tabletop_images=12, size=64, out=raw))
    command = ["data", "filter", "--raw", raw, "--out", str(tmp_path / "out")]
    drawn = [f"filters.{name}=null" for name in ("min_entropy", "min_sharpness", "max_text_area")]
    assert dim(*command, "filters.min_side=64", *drawn, "duplicates.max_distance=0") == 0
    assert "12 records: 12 kept" in capsys.readouterr().out
    (name,) = (tmp_path / "out/data").iterdir()
    schema = pq.read_schema(name)
    assert records.is_same(schema, records.FILTERED_IMAGE)
    assert verify(str(tmp_path / "out")).problems == []
    assert dim(*command, "--overwrite", "filters.min_ssim=0.3") == 2
    assert "min_ssim" in capsys.readouterr().err


def test_only_raw_records_are_filtered(tmp_path: Path, made: tuple[Path, Manifest]) -> None:
    config = FilterImagesConfig(raw=str(made[0]), out=str(tmp_path / "out"))
    with pytest.raises(InputError, match="holds raw_pair records, and raw_image records"):
        run(config)


def test_an_input_that_changes_meanwhile_stops_the_job(
    raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "raw"
    (copy / "data").mkdir(parents=True)
    for path in [raw / "manifest.json", *(raw / "data").iterdir()]:
        (copy / path.relative_to(raw)).write_bytes(path.read_bytes())

    def then_changed(*args: Any, **kwargs: Any) -> Any:
        judged = judge(*args, **kwargs)
        victim = sorted((copy / "data").iterdir())[1]
        pq.write_table(pq.read_table(victim).slice(1), victim)
        return judged

    monkeypatch.setattr("pipelines.steps.judge", then_changed)
    with pytest.raises(InputError, match=r"data/part-00001-of.*\.parquet changed while it was"):
        filter_pairs(copy, tmp_path / "out")
    assert not (tmp_path / "out/manifest.json").exists()
