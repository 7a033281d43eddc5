"""Whole jobs on a real local Ray: outputs, reruns, failures, and numbers that add up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from dim import cli, records
from dim.blueprint import Blueprint
from dim.designers import CallOptions
from dim.errors import DesignerError, InputError
from infra import storage
from pipelines import edit, ingest, t2i
from pipelines.edit import EditConfig
from pipelines.filters import ImageRules, PairRules
from pipelines.filters.duplicates import DuplicateRules
from pipelines.ingest import IngestConfig
from pipelines.job import TrackingConfig
from pipelines.outputs import export
from pipelines.outputs.manifest import Manifest
from pipelines.readers.fetch import FetchConfig
from pipelines.stages.caption import CaptionRules
from pipelines.t2i import T2IConfig
from tests.chat_server import ChatServer, Response, completion, running, text_of
from tests.pipelines.samples import bomb, write_pairs

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).resolve().parents[2]
SMALL = PairRules(min_side=32)
DRAWN = dict.fromkeys(("min_entropy", "min_sharpness", "max_text_area"))
TABLE = PairRules(min_side=32, min_changed=0.0005, min_ssim=-1, max_shift=None, **DRAWN)
ALIKE = DuplicateRules(exact=False, max_distance=None)
QUICK = CallOptions(retries=0, timeout_s=10)
PLAN = Blueprint("Add a red box.", "A field.", "- grass", "The left.", "A field with a box.")


def rows_in(uri: str | Path, folder: str) -> list[dict[str, Any]]:
    store = storage.open_store(str(uri))
    rows: list[dict[str, Any]] = []
    for name, _ in store.list(folder, suffix=".parquet"):
        with store.open_input(name) as file:
            rows += pq.read_table(file).to_pylist()
    return rows


def check_output(uri: str | Path, manifest: Manifest) -> None:
    """What a manifest says is what lies there, and nothing else does."""
    store = storage.open_store(str(uri))
    assert manifest.counts.add_up()
    assert Manifest.model_validate_json(store.read("manifest.json")) == manifest
    listed = {file.path: file for file in manifest.files}
    found = [name for name, _ in store.list(suffix=".parquet")]
    assert sorted(listed) == found
    for name in found:
        data = store.read(name)
        assert records.sha256_hex(data) == listed[name].sha256
        assert len(data) == listed[name].bytes
    assert manifest.rows_in("data") == manifest.counts.kept == len(rows_in(uri, "data"))
    assert manifest.rows_in("rejected") == manifest.counts.rejected
    assert manifest.rows_in("failed") == manifest.counts.failed
    reasons = Counter(row["reason"] for row in rows_in(uri, "rejected"))
    assert reasons == manifest.counts.by_reason
    assert not store.exists("ranges") and not store.exists("unfinished.json")


def blueprints(request: dict[str, Any]) -> Response:
    return completion(f"Alignment: aligned\n\n{PLAN.render()}")


def edit_config(raw: str | Path, out: str | Path, server: ChatServer, **more: Any) -> EditConfig:
    designer = f"openai:m@{server.url}"
    options = {"filters": SMALL, "calls": QUICK, "batch_size": 4, "rows_per_file": 8, **more}
    return EditConfig(raw=str(raw), out=str(out), designer=designer, **options)


@pytest.fixture(scope="module")
def raw(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty pairs and everything that can be wrong with one, as raw shards."""
    folder = tmp_path_factory.mktemp("pairs")
    path = write_pairs(folder, 20)
    lines = path.read_text().splitlines()
    (folder / "image" / "3_target.png").write_bytes(b"<html>")
    half = (folder / "image" / "5_source.png").read_bytes()
    (folder / "image" / "5_source.png").write_bytes(half[: len(half) // 2])
    (folder / "image" / "7_target.png").write_bytes(
        (folder / "image" / "7_source.png").read_bytes()
    )
    (folder / "image" / "9_source.png").unlink()
    lines[11] = "{broken"
    lines[13] = lines[12]
    path.write_text("\n".join(lines) + "\n")
    out = folder / "raw"
    manifest = ingest.run(IngestConfig(pairs=str(path), out=str(out), rows_per_file=6))
    check_output(out, manifest)
    return out


@pytest.fixture(scope="module")
def good_server() -> Iterator[ChatServer]:
    """A designer that finds every pair aligned."""
    with running(blueprints) as server:
        yield server


@pytest.fixture(scope="module")
def made(
    raw: Path, good_server: ChatServer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EditConfig, Manifest]:
    """The raw pairs, edited: how, and with what result."""
    config = edit_config(raw, tmp_path_factory.mktemp("made") / "edit", good_server)
    manifest = edit.run(config)
    check_output(config.out, manifest)
    assert manifest.counts.kept == len(good_server.requests) == 14
    return config, manifest


def test_ingest_accounts_for_every_line(raw: Path) -> None:
    manifest = Manifest.model_validate_json((raw / "manifest.json").read_bytes())
    counts = manifest.counts
    assert (counts.input, counts.kept, counts.rejected, counts.failed) == (20, 16, 2, 2)
    assert counts.by_reason == {"image.undecodable": 1, "record.repeated_id": 1}
    data = [file.path for file in manifest.files if file.path.startswith("data")]
    assert [path.rpartition("-")[0] for path in data] == [
        f"data/part-{n:05d}-of-00004-0" for n in range(4)
    ]
    assert [row["index"] for row in rows_in(raw, "data")] == [
        n for n in range(20) if n not in (3, 9, 11, 13)
    ]
    failed = {row["index"]: row["error"] for row in rows_in(raw, "failed")}
    assert "line 10: not found" in failed[9] and "line 12: not JSON" in failed[11]


def test_edit_makes_shards_that_others_can_read(
    raw: Path, tmp_path: Path, chat_server: ChatServer
) -> None:
    def respond(request: dict[str, Any]) -> Response:
        if "number 1." in text_of(request):
            return completion("Alignment: misaligned")
        return blueprints(request) if "number 2." not in text_of(request) else completion("no")

    chat_server.respond = respond
    out = tmp_path / "edit"
    manifest = edit.run(edit_config(raw, out, chat_server))
    check_output(out, manifest)
    counts = manifest.counts
    assert (counts.input, counts.kept, counts.rejected, counts.failed) == (16, 12, 3, 1)
    assert counts.by_reason == {
        "image.undecodable": 1,
        "pair.unchanged": 1,
        "triage.misaligned": 1,
    }
    assert len(chat_server.requests) == 14 + 2  # what is no answer was asked for again, twice
    assert pq.read_schema(out / manifest.files[0].path).equals(records.EDIT)

    import datasets

    loaded = datasets.load_dataset(
        "parquet",
        data_files=str(out / "data" / "*.parquet"),
        split="train",
        cache_dir=str(tmp_path / "cache"),
    )
    assert loaded.num_rows == 12
    assert set(loaded["blueprint"]) == {PLAN.render()}
    assert loaded[0]["image"] == rows_in(raw, "data")[0]["image"]


def test_a_finished_job_does_nothing_when_run_again(
    made: tuple[EditConfig, Manifest], good_server: ChatServer
) -> None:
    config, first = made
    before = {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")}
    good_server.requests.clear()
    assert edit.run(config) == first
    assert edit.run(config.model_copy(update={"batch_size": 9, "workers": 5})) == first
    assert {path: path.stat().st_mtime_ns for path in Path(config.out).rglob("*")} == before
    assert good_server.requests == []
    with pytest.raises(InputError, match=r"filters.min_side was 32 and is 40.*--overwrite"):
        edit.run(config.model_copy(update={"filters": PairRules(min_side=40)}))
    with pytest.raises(InputError, match="holds the output of 'data edit'"):
        ingest.run(IngestConfig(tabletop=3, out=config.out))


def test_the_same_input_gives_the_same_files_whatever_the_parallelism(
    made: tuple[EditConfig, Manifest], good_server: ChatServer
) -> None:
    config, first = made
    good_server.requests.clear()
    other = config.model_copy(update={"batch_size": 3, "workers": 3})
    again = edit.run(other, overwrite=True)
    check_output(config.out, again)
    assert (again.files, again.counts) == (first.files, first.counts)
    assert good_server.requests == []  # made anew from the answers that were paid for


def test_what_failed_can_be_tried_again(raw: Path, tmp_path: Path, chat_server: ChatServer) -> None:
    chat_server.respond = lambda request: (
        Response(b"{}", 500) if "number 4." in text_of(request) else blueprints(request)
    )
    config = edit_config(raw, tmp_path / "edit", chat_server)
    first = edit.run(config)
    assert first.counts.failed == 1
    (failed,) = rows_in(config.out, "failed")
    assert failed["id"] == "pair-4" and failed["stage"] == "blueprint"
    assert "HTTP 500" in failed["error"] and failed["content_hash"]

    chat_server.requests.clear()
    chat_server.respond = blueprints
    second = edit.run(config, retry_failed=True)
    check_output(config.out, second)
    assert (second.counts.failed, second.counts.kept) == (0, first.counts.kept + 1)
    assert len(chat_server.requests) == 1


def test_a_killed_job_pays_no_answered_call_twice(
    raw: Path, tmp_path: Path, chat_server: ChatServer, made: tuple[EditConfig, Manifest]
) -> None:
    import ray

    answered: list[str] = []

    def slowly(request: dict[str, Any]) -> Response:
        time.sleep(0.2)
        answered.append(text_of(request))
        return blueprints(request)

    chat_server.respond = slowly
    out = tmp_path / "edit"
    command = [
        *(sys.executable, "-m", "pipelines.edit", "--raw", str(raw), "--out", str(out)),
        *("--designer", f"openai:m@{chat_server.url}", "filters.min_side=32", "batch_size=2"),
        *("calls.in_flight=1", "rows_per_file=8", "calls.retries=0"),
    ]
    address = ray.get_runtime_context().gcs_address
    environment = {**os.environ, "RAY_ADDRESS": address}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(answered) < 5 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    time.sleep(1)
    stored = [
        json.loads(line)
        for path in (out / "answers").rglob("*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert 4 <= len(stored) < 14
    assert (out / "unfinished.json").exists() and not (out / "manifest.json").exists()
    with pytest.raises(InputError, match="is not finished"):
        export.run(export.ExportConfig(data=str(out), out=str(tmp_path / "export")))

    chat_server.requests.clear()
    chat_server.respond = blueprints
    config = edit_config(raw, out, chat_server)
    manifest = edit.run(config)
    check_output(out, manifest)
    assert manifest.counts.kept == 14
    assert len(chat_server.requests) == 14 - len(stored)
    assert manifest.files == made[1].files


def test_on_an_object_store(
    raw: Path, s3: str, good_server: ChatServer, made: tuple[EditConfig, Manifest]
) -> None:
    storage.upload_folder(raw.parent / "image", f"{s3}/in/image")
    storage.write_bytes(f"{s3}/in/pairs.jsonl", (raw.parent / "pairs.jsonl").read_bytes())
    manifest = ingest.run(
        IngestConfig(pairs=f"{s3}/in/pairs.jsonl", out=f"{s3}/raw", rows_per_file=6)
    )
    check_output(f"{s3}/raw", manifest)
    remote = edit.run(edit_config(f"{s3}/raw", f"{s3}/edit", good_server))
    check_output(f"{s3}/edit", remote)
    config, local = made
    assert remote.counts == local.counts
    kept, kept_local = rows_in(f"{s3}/edit", "data"), rows_in(config.out, "data")
    for one, other in zip(kept, kept_local, strict=True):
        assert {**one, "provenance": ""} == {**other, "provenance": ""}
    assert storage.open_dataset([f"{s3}/edit", config.out]).count_rows() == 2 * len(kept)
    stored = storage.open_store(f"{s3}/edit").list("answers")
    assert stored and all(size > 0 for _, size in stored)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "precious.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no output of a data job"):
        ingest.run(IngestConfig(tabletop=2, out=str(tmp_path)), overwrite=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["data", "precious.txt"]


def test_an_error_of_a_worker_is_one_sentence(raw: Path, tmp_path: Path) -> None:
    recording = tmp_path / "answers.jsonl"
    recording.write_text('{"instruction": "x"}\n')
    config = EditConfig(
        raw=str(raw), out=str(tmp_path / "edit"), designer=f"replay:{recording}", filters=SMALL
    )
    with pytest.raises(DesignerError, match="line 1, has no text") as caught:
        edit.run(config)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "edit" / "manifest.json").exists()


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [("nobody", "unknown designer 'nobody'"), ("replay:gone.jsonl", "not found: gone.jsonl")],
)
def test_a_wrong_designer_is_refused_before_anything_is_touched(
    raw: Path, tmp_path: Path, spec: str, complaint: str
) -> None:
    config = EditConfig(raw=str(raw), out=str(tmp_path / "edit"), designer=spec)
    with pytest.raises(DesignerError, match=complaint):
        edit.run(config)
    assert not (tmp_path / "edit").exists()


def test_wrong_inputs_are_one_sentence(raw: Path, tmp_path: Path) -> None:
    config = EditConfig(raw=str(tmp_path / "gone"), out=str(tmp_path / "x"), designer="oracle")
    with pytest.raises(InputError, match=r"the input .*/gone does not exist"):
        edit.run(config)
    images = T2IConfig(raw=str(raw), out=str(tmp_path / "x"), captioner="oracle")
    with pytest.raises(InputError, match="holds raw_pair records, and raw_image records are need"):
        t2i.run(images)


def test_tabletop_pairs_through_the_oracle(tmp_path: Path) -> None:
    raw_pairs = IngestConfig(tabletop=40, out=str(tmp_path / "raw"), seed=5, rows_per_file=16)
    check_output(raw_pairs.out, ingest.run(raw_pairs))
    config = EditConfig(
        raw=raw_pairs.out,
        out=str(tmp_path / "edit"),
        designer="oracle",
        filters=TABLE,
        duplicates=ALIKE,
        workers=2,
    )
    manifest = edit.run(config)
    check_output(config.out, manifest)
    assert manifest.counts.kept >= 38
    for row in rows_in(config.out, "data"):
        assert row["alignment"] == "aligned"
        assert Blueprint.parse(row["blueprint"]).instruction == row["instruction"]
        assert json.loads(row["provenance"])["tabletop"]["target_scene"]
    assert not (tmp_path / "edit" / "answers").exists()


def test_tabletop_images_become_captions(tmp_path: Path) -> None:
    raw_images = IngestConfig(tabletop_images=20, out=str(tmp_path / "raw"), rows_per_file=8)
    ingest.run(raw_images)
    config = T2IConfig(
        raw=raw_images.out,
        out=str(tmp_path / "t2i"),
        captioner="oracle",
        filters=ImageRules(min_side=64, **DRAWN),
        duplicates=ALIKE,
        captions=CaptionRules(min_words=5),
        tracking=TrackingConfig(uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="test"),
    )
    manifest = t2i.run(config)
    check_output(config.out, manifest)
    assert manifest.counts.kept >= 19
    rows = rows_in(config.out, "data")
    assert all(row["captioner"] == "oracle" and "table" in row["caption"] for row in rows)

    from mlflow import MlflowClient

    client = MlflowClient(config.tracking.uri if config.tracking else "")
    experiment = client.get_experiment_by_name("test")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert metrics["input"] == 20 == metrics["kept"] + metrics["rejected"] + metrics["failed"]
    assert run.data.params["captioner"] == "oracle"
    assert metrics["cost/cpu_hours"] > metrics["cost/node_hours"] > 0
    assert metrics["kept_share"] == metrics["kept"] / 20 and metrics["records_per_second"] > 0
    used = {item.tags[0].value: item.dataset for item in run.inputs.dataset_inputs}
    assert json.loads(used["input"].source)["uri"] == raw_images.out
    assert json.loads(used["output"].source)["uri"] == config.out
    assert json.loads(used["output"].profile)["kept"] == manifest.counts.kept
    artifacts = {item.path for item in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"manifest.json", "README.md"}
    card = (tmp_path / "t2i" / "README.md").read_text()
    assert "# DIM-T2I" in card and f"| tabletop | not declared | {manifest.counts.kept} |" in card


def test_nothing_kept_is_still_a_finished_output(tmp_path: Path, raw: Path) -> None:
    config = EditConfig(raw=str(raw), out=str(tmp_path / "edit"), designer="oracle")
    manifest = edit.run(config)  # 256 px at least: all pairs are too small
    check_output(config.out, manifest)
    assert manifest.counts.by_reason == {"image.too_small": 15, "pair.unchanged": 1}
    assert storage.open_dataset(config.out).count_rows() == 0


def test_the_command_line(
    raw: Path, tmp_path: Path, chat_server: ChatServer, capsys: pytest.CaptureFixture[str]
) -> None:
    def dim(*arguments: str) -> tuple[int, str, str]:
        code = cli.execute(cli.root(), arguments, prog_name="dim")
        said = capsys.readouterr()
        return code, said.out, said.err

    out, pairs = str(raw), str(raw.parent / "pairs.jsonl")
    code, said, _ = dim("data", "ingest", "--pairs", pairs, "--out", out, "rows_per_file=6")
    assert code == 0
    assert "20 records: 16 kept, 2 rejected, 2 failed" in said and "1 record.repeated_id" in said

    code, _, error = dim("data", "ingest", "--pairs", str(tmp_path / "no.jsonl"), "--out", out)
    assert code == 1 and error.splitlines()[-1].startswith("error: not found: ")
    code, _, error = dim("data", "ingest", "--out", out)
    assert code == 2 and "give exactly one of pairs, images" in error
    code, _, error = dim("data", "ingest", "--tabletop", "4", "--kinds", "explode", "--out", out)
    assert code == 2 and "unknown kind 'explode'" in error

    base = ("data", "edit", "--raw", out, "--designer", f"openai:m@{chat_server.url}")
    code, _, error = dim(*base, "--out", str(tmp_path / "e"), "filters.min_sid=3")
    assert code == 2 and "did you mean 'min_side'" in error
    chat_server.respond = lambda request: Response(b"{}", 500)
    options = ("filters.min_side=32", "calls.retries=0")
    code, said, error = dim(*base, "--out", str(tmp_path / "e"), *options)
    assert code == 1 and "14 failed" in said
    assert error.splitlines()[-1].startswith("error: no record was kept and 14 failed")
    chat_server.respond = blueprints
    code, said, _ = dim(*base, "--out", str(tmp_path / "e"), "--retry-failed", *options)
    assert code == 0 and "14 kept" in said

    target = tmp_path / "public"
    code, said, _ = dim("data", "export", "--data", str(tmp_path / "e"), "--out", str(target))
    assert code == 0
    lines = [json.loads(x) for x in (target / "tos_dataset_edit.jsonl").read_text().splitlines()]
    assert len(lines) == 14 and (target / lines[0]["image_path"]).is_file()


def test_how_images_are_fetched_may_differ_and_which_are_taken_may_not(tmp_path: Path) -> None:
    pairs = write_pairs(tmp_path, 2)
    given = {"pairs": str(pairs), "out": str(tmp_path / "raw")}
    done = ingest.run(IngestConfig(**given, fetch=FetchConfig(attempts=2)))
    quicker = FetchConfig(workers=2, per_host=4, attempts=9, timeout_s=5)
    assert ingest.run(IngestConfig(**given, fetch=quicker)) == done
    with pytest.raises(InputError, match=r"made otherwise \(fetch.max_bytes was 50000000"):
        ingest.run(IngestConfig(**given, fetch=FetchConfig(max_bytes=1000)))


def test_one_damaged_image_in_twenty_and_a_bomb_are_left_out_and_nothing_else(
    tmp_path: Path, good_server: ChatServer
) -> None:
    pairs = write_pairs(tmp_path, 40)
    image = tmp_path / "image"
    for number, side in ((6, "source"), (21, "target"), (22, "source"), (39, "target")):
        name = image / f"{number}_{side}.png"
        data = name.read_bytes()
        name.write_bytes(data[: len(data) // 2])
    (image / "11_target.png").write_bytes(bomb())
    taken = ingest.run(IngestConfig(pairs=str(pairs), out=str(tmp_path / "raw")))
    check_output(tmp_path / "raw", taken)
    assert taken.counts.by_reason == {"image.too_large": 1}
    asked = len(good_server.requests)
    done = edit.run(edit_config(tmp_path / "raw", tmp_path / "edit", good_server))
    check_output(tmp_path / "edit", done)
    assert (done.counts.input, done.counts.kept) == (39, 35)
    assert done.counts.by_reason == {"image.undecodable": 4}
    assert len(good_server.requests) - asked == 35  # nothing is paid for a picture that is damaged
