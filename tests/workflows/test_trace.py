"""``dim trace``: from an image as the server makes it to the model, the run and the data."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import ExifTags, Image, PngImagePlugin

from dim import cli, provenance
from dim.config import dump_config
from infra import samples
from infra.fingerprint import fingerprint
from infra.registry import Registry
from infra.storage import open_store
from infra.tracking import Tracking
from pipelines.outputs import manifest as manifests
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from tests.serving import fakes
from tests.serving.fakes import Server, picture
from training.record import StageRecord
from training.stage import StageConfig


def painted(model_hash: str, **fields: Any) -> bytes:
    """An image out of the server's own route and encoder."""
    server = Server()
    server.painter.release = replace(fakes.RELEASE, model_hash=model_hash)
    answer = server.http.post(
        "/v1/images/edits", files={"image": ("a.png", picture())},
        data={"prompt": "make it blue", "seed": "7", **fields},
    )  # fmt: skip
    assert answer.status_code == 200, answer.text
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def output(folder: Path, job: str, source: dict[str, Any], config: dict[str, Any]) -> str:
    """What a data job leaves, as far as the trace looks at it."""
    counts = Counts(input=9, kept=9, rejected=0, failed=0, by_reason={})
    file = FileEntry(path="data/0.parquet", rows=9, bytes=1, sha256=job.ljust(64, "0"))
    manifests.write(
        open_store(str(folder)),
        Manifest(job=job, config=config, input=source, counts=counts, files=(file,)),
    )
    return str(folder)


def files_of(address: str) -> str:
    from pipelines.outputs.shards import Shards

    return Shards(*manifests.open_finished(address)).identity["files"]


class House:
    """A model that was trained, registered and served, and the data that it learnt from."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder = folder
        self.uri = f"sqlite:///{folder}/mlflow.db"
        raw = output(folder / "raw", "ingest", {"file": "pairs.jsonl", "rows": 9}, {})
        self.edit = output(
            folder / "edit", "edit", {"uri": raw, "files": files_of(raw)}, {"designer": "oracle"}
        )
        self.out = folder / "stage"
        (self.out / "model").mkdir(parents=True)
        for name in ("dim.json", "connector.safetensors"):
            (self.out / "model" / name).write_bytes((model / name).read_bytes())
        self.model = str(self.out / "model")
        self.hash = fingerprint(self.model)
        with Tracking(self.uri, "dim-training").run("edit1") as run:
            run.log_metrics({"loss": 0.25})
        self.run = run.id
        init = folder / "init.yaml"
        init.write_text("{}")
        config = StageConfig.model_validate(
            {"stage": "edit1", "init": str(init), "data": [self.edit], "out": str(self.out),
             "steps": 1, "batch_size": 2, "learning_rate": 1e-4}
        )  # fmt: skip
        identity = {
            "stage": "edit1",
            "data": samples.fingerprint([self.edit]),
            "init": fingerprint(str(init)),
        }
        StageRecord(identity, dump_config(config), run.id, finished=True).write(str(self.out))
        registry = Registry(self.uri)
        made = registry.register("dim", self.model, run.id, metrics={}, tags={})
        registry.point("champion", made)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> House:
    return House(tmp_path_factory.mktemp("house"), tiny_model_dir)


@pytest.fixture(autouse=True)
def no_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main(["trace", *map(str, arguments)])
    said = capsys.readouterr()
    return int(ended.value.code or 0), said.out, said.err


def links(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_served_image_leads_to_model_run_and_data(
    format: str, house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / f"edited.{format}"
    file.write_bytes(painted(house.hash, output_format=format))
    found = links(capsys, file, "--uri", house.uri)
    assert [link["what"] for link in found] == ["image", "model", "stage", "run", "data", "data"]
    assert [link["why"] for link in found] == [""] * 6
    image, model, stage, run, edit, raw = found
    assert image["said"]["seed"] == "7" and image["said"]["model_hash"] == house.hash
    assert model["where"] == house.model
    assert (model["said"]["registered"], model["said"]["aliases"]) == ("models:/dim/1", "@champion")
    assert stage["where"] == str(house.out) and stage["said"]["run"] == house.run
    assert (run["said"]["name"], run["said"]["loss"]) == ("edit1", "0.25")
    assert edit["where"] == house.edit and edit["said"]["designer"] == "oracle"
    assert raw["said"]["from"] == "pairs.jsonl" and raw["said"]["job"] == "ingest"


def test_a_model_is_compared(
    house: House, tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edited.png"
    file.write_bytes(painted(house.hash))
    found = links(capsys, file, "--model", house.model)
    assert found[1]["where"] == house.model and found[1]["why"] == ""
    assert "no MLflow store is known" in found[2]["why"]
    assert found[3]["what"] == "stage" and found[3]["where"] == str(house.out)
    assert "no MLflow store at" in found[4]["why"]  # the stage's own default, which is not there
    assert not (house.out / "mlflow.db").exists()
    code, out, err = run(capsys, file, "--model", tiny_model_dir, "--uri", house.uri)
    assert code == 1 and "was painted by another model" in err
    assert "models:/dim/1" in out  # what the image says is followed all the same


def test_an_image_of_the_command_line_is_followed_too(
    tiny_model_dir: Path, house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "painted.png"
    words = [
        "generate",
        "a cup",
        "--model",
        str(tiny_model_dir),
        "--steps",
        "1",
        "--out",
        str(file),
    ]
    assert cli.execute(cli.root(), words, prog_name="dim") == 0
    image, model, *_ = links(capsys, file, "--model", tiny_model_dir)
    assert image["said"]["steps"] == "1" and model["why"] == ""
    code, _, err = run(capsys, file, "--model", house.model)
    assert code == 1 and "was painted by another model" in err


def test_what_cannot_be_followed_says_why(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "edited.png"
    file.write_bytes(painted("ab" * 32))
    found = links(capsys, file, "--uri", house.uri)
    assert [link["what"] for link in found] == ["image", "model"]
    assert "no registered model has the hash" in found[1]["why"]
    (found,) = links(capsys, file, "--uri", f"sqlite:///{tmp_path}/none/mlflow.db")[1:]
    assert "there is no MLflow store" in found["why"] and not (tmp_path / "none").exists()


def test_what_was_changed_since_is_said(
    tmp_path: Path, tiny_model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    house = House(tmp_path, tiny_model_dir)
    file = tmp_path / "edited.png"
    file.write_bytes(painted(house.hash))
    output(tmp_path / "raw", "other", {}, {})
    *_, edit, raw = links(capsys, file, "--uri", house.uri)
    assert (edit["why"], raw["why"]) == ("", "it holds other records by now")
    output(tmp_path / "edit", "edited", {}, {})
    by_what = {link["what"]: link for link in links(capsys, file, "--uri", house.uri)}
    assert by_what["stage"]["why"] == "its data hold something else by now"
    (tmp_path / "edit" / "manifest.json").unlink()
    *_, edit = links(capsys, file, "--uri", house.uri)
    assert "is not finished" in edit["why"]
    (house.out / "stage.json").unlink()
    *_, stage = links(capsys, file, "--uri", house.uri)
    assert "it was not trained there" in stage["why"]
    (house.out / "model" / "dim.json").write_text("{}")
    *_, model = links(capsys, file, "--uri", house.uri)
    assert model["why"] == "its folder holds another by now"


def test_an_image_of_others_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "photo.png"
    file.write_bytes(picture())
    code, out, err = run(capsys, file)
    assert (code, out) == (1, "") and "does not say how it was painted" in err
    code, _, err = run(capsys, tmp_path / "nothing.png")
    assert code == 1 and "No such file" in err
    assert err.count("\n") == 1


def forged(values: Any, format: str = "PNG") -> bytes:
    said, buffer = json.dumps(values), io.BytesIO()
    image = Image.new("RGB", (16, 16))
    if format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text(provenance.KEY, said)
        image.save(buffer, format=format, pnginfo=chunks)
    else:
        exif = Image.Exif()
        exif[ExifTags.Base.ImageDescription] = said
        image.save(buffer, format=format, exif=exif)
    return buffer.getvalue()


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize(
    "values",
    [
        {"model": "x" * 100_000},
        {"model": "dim", "seed": 7},
        {"model": "dim", "seed": ["7"]},
        ["model"],
        {"model": {"model": "dim"}},
    ],
    ids=range(5),
)
def test_forged_words_of_another_form_say_nothing(
    values: Any, format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "forged"
    file.write_bytes(forged(values, format))
    code, _, err = run(capsys, file)
    assert code == 1 and "does not say how it was painted" in err and len(err) < 300


def test_forged_words_neither_lead_anywhere_nor_reach_the_terminal(
    house: House, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "forged.png"
    evil = "\x1b]0;owned\x07\x1b[2J\r\n\u202e"
    for content in ("' OR 1=1 --", "../../etc/passwd", "s3://bucket/model", evil, ""):
        file.write_bytes(forged({"model": evil, evil: evil, "model_hash": content}))
        code, out, err = run(capsys, file, "--uri", house.uri)
        assert code == 0, err
        assert "names no hash of a model" in out
        assert all(letter == "\n" or letter.isprintable() for letter in out)
        assert out.count("\n") == 6  # no line of its own
        json_out = run(capsys, file, "--json")[1]
        assert json.loads(json_out)[0]["said"]["model"] == evil and "\x1b" not in json_out
