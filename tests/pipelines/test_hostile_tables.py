"""Tables whose values run code when they are unpickled, given to everything that reads tables.

Each attack is made with a real payload, and each test ends with the same look: it has not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from dim.errors import InputError, StorageError
from dim.failures import find_dim_error
from dim.records import EDIT, RAW_PAIR
from infra import storage
from infra.samples import open_features, open_images
from pipelines import edit, evaluate, features, ingest
from pipelines.edit import EditConfig
from pipelines.evaluate import EvaluateConfig
from pipelines.features import FeaturesConfig
from pipelines.filter import FilterPairsConfig
from pipelines.filter import run as run_filter
from pipelines.filters import PairRules
from pipelines.ingest import IngestConfig
from pipelines.outputs import card, export
from pipelines.outputs.export import ExportConfig
from pipelines.outputs.inspect import inspect
from pipelines.outputs.shards import Shards
from pipelines.outputs.verify import verify
from pipelines.readers import forms
from pipelines.readers.entries import Files
from pipelines.readers.layout import Layout
from pipelines.readers.media import Media
from pipelines.readers.records import Records
from tests.feature_shards import write_features
from tests.hostile import pickled, poison, write
from tests.pipelines.containers import source, target, write_lines
from tests.pipelines.finished import edit_rows, finish

pytestmark = pytest.mark.usefixtures("ray_cluster")

LAYOUT = Layout(image=("image",), target=("image_target",), id=("id",))
RULES = PairRules(min_side=32, min_changed=0.0005, min_ssim=-1)


@pytest.fixture
def marker(tmp_path: Path) -> Iterator[Path]:
    """What the payload leaves behind; it must not be there in the end."""
    path = tmp_path / "the payload ran"
    yield path
    assert not path.exists()


def pairs(path: Path, **columns: Any) -> Path:
    plain = {
        "id": ["a"],
        "instruction": ["Add a box."],
        "image": [source(0)],
        "image_target": [target(0)],
    }
    return write(path, {**plain, **columns})


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["id", "image", "unused"])
def test_ingest_refuses_the_file(suffix: str, column: str, marker: Path, tmp_path: Path) -> None:
    pairs(tmp_path / "in" / f"good{suffix}")
    pairs(tmp_path / "in" / f"evil{suffix}", **{column: pickled(marker)})
    config = IngestConfig(pairs=str(tmp_path / "in"), out=str(tmp_path / "out"))
    with pytest.raises(InputError) as error:
        ingest.run(config)
    said = f"the column '{column}' of {tmp_path}/in/evil{suffix} is of the extension type"
    assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["key", "image"])
def test_ingest_refuses_media(suffix: str, column: str, marker: Path, tmp_path: Path) -> None:
    columns = {"key": ["a"], "image": [source(0)], column: pickled(marker)}
    write(tmp_path / "media" / f"m{suffix}", columns)
    lines = write_lines(tmp_path / "list.jsonl", [{"image": "a"}])
    media = {"uri": str(tmp_path / "media"), "key": "key"}
    config = IngestConfig(images=str(lines), media=media, out=str(tmp_path / "out"))
    with pytest.raises(InputError, match=rf"the column '{column}' of \S*m\{suffix} is of the ext"):
        ingest.run(config)


def in_a_worker(work: Callable[..., Any], *arguments: Any) -> Any:
    """What ``work`` returns in a process that has Ray Data."""

    def run() -> Any:
        import ray.data  # noqa: F401

        return work(*arguments)

    return ray.get(ray.remote(run).remote())


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("column", ["id", "image", "image_target", "instruction"])
def test_a_worker_that_is_given_such_a_file_reads_nothing_of_it(
    suffix: str, column: str, marker: Path, tmp_path: Path
) -> None:
    """The file can change after the driver has looked at it."""
    pairs(tmp_path / f"evil{suffix}", **{column: pickled(marker)})
    store = storage.open_store(str(tmp_path))
    reader = Records(Files(store, "evil", LAYOUT.columns), LAYOUT)
    part = {"file": f"evil{suffix}", "kind": forms.TABLE, "called": "evil", "offset": 0}
    parts = json.dumps([{**part, "count": 1, "damage": None}])
    each = {"first": 0, "count": 1, "repeated": [-1], "files": parts}
    (table,) = in_a_worker(lambda: list(map(reader.table, reader.parts(each))))
    (row,) = table.to_pylist()
    assert row["outcome"] == "failed" and row["image"] is None
    assert f"the column '{column}' of {tmp_path}/evil{suffix} is of the ext" in row["error"]


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_worker_reads_nothing_of_such_media(suffix: str, marker: Path, tmp_path: Path) -> None:
    write(tmp_path / f"evil{suffix}", {"image": pickled(marker)})
    media = Media("media", storage.open_store(str(tmp_path)), ("image",), forms.TABLE)
    found = in_a_worker(media.read, {"a": (f"evil{suffix}", 0)})["a"]
    assert isinstance(found, InputError)
    assert f"the column 'image' of {tmp_path}/evil{suffix} is of the extension" in str(found)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A finished output of edit records, in two files."""
    finish(storage.open_store(str(tmp_path / "edit")), edit_rows(14))
    return tmp_path / "edit"


READERS: dict[str, Callable[[str, Path], object]] = {
    "open": lambda uri, _: Shards.open(uri, EDIT),
    "batches": lambda uri, _: list(Shards.open(uri, EDIT).batches()),
    "card": lambda uri, _: card.write(Shards.open(uri, EDIT)),
    "inspect": lambda uri, _: inspect(uri).render(),
    "export": lambda uri, out: export.run(ExportConfig(data=uri, out=str(out))),
    "webdataset": lambda uri, out: export.run(
        ExportConfig(data=uri, out=str(out), format="webdataset")
    ),
    "dataset": lambda uri, _: storage.open_dataset([uri]).to_table().to_pylist(),
    "samples": lambda uri, _: open_images([uri], ["id", "image"]),
}


@pytest.mark.parametrize("column", ["id", "image", "more"])
@pytest.mark.parametrize("reader", sorted(READERS))
def test_a_finished_output_of_others_is_refused(
    reader: str, column: str, output: Path, marker: Path, tmp_path: Path
) -> None:
    name = poison(output, column, marker)
    with pytest.raises(InputError) as error:
        READERS[reader](str(output), tmp_path / "out")
    assert f"the column '{column}' of {output}/{name} is of the extension" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reader", sorted(set(READERS) - {"open"}))
def test_its_second_file_is_looked_at_too(
    reader: str, output: Path, marker: Path, tmp_path: Path
) -> None:
    name = poison(output, "answer", marker, file=1)
    with pytest.raises(InputError, match=f"the column 'answer' of {output}/{name} is of the ext"):
        READERS[reader](str(output), tmp_path / "out")


def test_verify_names_the_column(output: Path, marker: Path) -> None:
    name = poison(output, "id", marker, file=1)
    problems = verify(str(output), images=True).problems
    assert any(f"the column 'id' of {output}/{name} is of the ext" in each for each in problems)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """Raw pairs of the tabletop in two files, as their job makes them."""
    ingest.run(IngestConfig(tabletop=24, size=64, rows_per_file=12, out=str(tmp_path / "raw")))
    return tmp_path / "raw"


@pytest.mark.parametrize("job", ["filter", "edit", "edit without duplicates"])
def test_a_job_stops_where_its_worker_opens_such_a_file(
    job: str, raw: Path, marker: Path, tmp_path: Path
) -> None:
    """The driver opens the first file alone; the second one is found by a worker."""
    name = poison(raw, "instruction", marker, file=1)
    assert Shards.open(str(raw), RAW_PAIR)
    given = {"raw": str(raw), "out": str(tmp_path / "out"), "filters": RULES}
    off = {"exact": False, "max_distance": None} if job == "edit without duplicates" else {}
    with pytest.raises(InputError) as error:
        if job == "filter":
            run_filter(FilterPairsConfig(**given))
        else:
            edit.run(EditConfig(**given, designer="oracle", duplicates=off))
    assert f"the column 'instruction' of {raw}/{name} is of the ext" in str(error.value)
    assert "\n" not in str(error.value)


def test_features_and_evaluation_stop_too(
    raw: Path, marker: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    out = tmp_path / "edit"
    edit.run(
        EditConfig(raw=str(raw), out=str(out), designer="oracle", filters=RULES, rows_per_file=12)
    )
    name = poison(out, "blueprint", marker, file=1)
    model = {"model": str(tiny_model_dir), "data": str(out)}
    for run in (
        lambda: features.run(FeaturesConfig(**model, out=str(tmp_path / "features"))),
        lambda: evaluate.run(EvaluateConfig(**model, ways=("blueprint",), steps=1)),
    ):
        with pytest.raises(InputError) as error:
            run()
        said = str(find_dim_error(error.value))
        assert said.startswith(f"the column 'blueprint' of {out}/{name} is of the extension")


def test_feature_shards_of_others_are_refused(
    marker: Path, tmp_path: Path, tiny_model_dir: Path
) -> None:
    rows = [row for row in edit_rows(3) if row.get("outcome", "kept") == "kept"]
    for row in rows:
        row["blueprint"] = "[Instruction] x"
    finish(storage.open_store(str(tmp_path / "edit")), rows)
    where = write_features(
        str(tmp_path / "edit"), tmp_path / "features", tiny_model_dir, texts=("instruction",)
    )
    assert open_features([where], texts=["instruction"], edits=True).rows == len(rows)
    name = poison(Path(where), "id", marker)
    with pytest.raises(InputError, match=f"the column 'id' of {where}/{name} is of the extension"):
        open_features([where], texts=["instruction"], edits=True)


def test_what_a_stopped_job_left_is_looked_at_like_any_other_file(
    marker: Path, tmp_path: Path
) -> None:
    """The features of a stopped job lie in its output folder, where others may write."""
    write(tmp_path / "left.arrow", {"id": pickled(marker)})
    store = storage.open_store(str(tmp_path))
    with (
        pytest.raises(InputError, match="the column 'id' of .*left.arrow is of the extension"),
        store.open_arrow("left.arrow") as (_, batches),
    ):
        list(batches)
    (tmp_path / "cut.arrow").write_bytes((tmp_path / "left.arrow").read_bytes()[:20])
    with (
        pytest.raises(StorageError, match="cannot read .*cut.arrow"),
        store.open_arrow("cut.arrow"),
    ):
        pass
