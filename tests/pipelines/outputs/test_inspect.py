from __future__ import annotations

import base64
import io
import json
import re
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dim import cli, records
from dim.errors import DimError, InputError, StorageError
from infra.storage import open_store
from pipelines.filters import FilterPairs, PairRules, PairThresholds
from pipelines.outcome import fail, to_rows, to_table
from pipelines.outputs import histograms, inspect, manifest
from pipelines.outputs.files import FOLDERS
from pipelines.outputs.manifest import Counts, FileEntry, Manifest
from pipelines.readers.records import pair_columns
from tests.pipelines.samples import edited, encoded, photo

GOOD = 8
RULES = PairRules(
    min_side=32, min_sharpness=None, sources={"other": PairThresholds(min_changed=0.2)}
)


def write_output(folder: Path, table: pa.Table, kept: pa.Schema, config: dict[str, Any]) -> None:
    """An output as a job leaves it, of records with outcomes."""
    schemas = {"kept": kept, "rejected": records.REJECT, "failed": records.FAILED}
    files, rows, reasons = [], {}, {}
    for outcome, schema in schemas.items():
        part = table.filter(pc.equal(table["outcome"], outcome))
        path = folder / FOLDERS[outcome] / "part-00000.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(part.to_pylist(), schema=schema), path)
        name = str(path.relative_to(folder))
        files.append(FileEntry(path=name, rows=part.num_rows, bytes=1, sha256=""))
        rows[outcome] = part.num_rows
        if outcome == "rejected":
            for reason in part["reason"].to_pylist():
                reasons[reason] = reasons.get(reason, 0) + 1
    counts = Counts(input=table.num_rows, **rows, by_reason=reasons)
    found = Manifest(job="edit", config=config, input={}, counts=counts, files=tuple(files))
    manifest.write(open_store(str(folder)), found)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    """A filtered data set: eight good pairs, four bad ones and a failure, and its raw input."""
    pictures = [photo(number, (96, 96)) for number in range(GOOD)]
    images = [(encoded(picture), encoded(edited(picture))) for picture in pictures]
    small = encoded(photo(1, (20, 20)))
    images += [
        (images[0][0], images[0][0]),
        (small, small + b" "),
        (images[0][0], images[0][1][:90]),
        (images[1][0], encoded(pictures[1], "BMP")),
        images[2],
    ]
    words = "Add <b>a box</b>."
    rows = [
        {
            "id": f"p{n}",
            "index": n,
            "source": "t",
            "instruction": words,
            **pair_columns(words, *two),
        }
        for n, two in enumerate(images)
    ]
    raw = pa.Table.from_pylist(rows, schema=records.RAW_PAIR)
    write_output(tmp_path / "raw", to_table(to_rows(raw), records.RAW_PAIR), records.RAW_PAIR, {})
    result = FilterPairs(RULES)(raw).to_pylist()
    fail(result[-1], "blueprint", "the endpoint said 500 & <nothing> else")
    config = {"raw": str(tmp_path / "raw"), "filters": RULES.model_dump(mode="json")}
    table = pa.Table.from_pylist(result, schema=to_table([], records.EDIT).schema)
    write_output(tmp_path / "edit", table, records.EDIT, config)
    return tmp_path / "edit"


def test_every_outcome_is_there_with_its_pictures(output: Path) -> None:
    found = inspect.inspect(str(output))
    assert [row["id"] for row in found.kept] == [f"p{n}" for n in range(GOOD)]
    assert {reason: [row["id"] for row in rows] for reason, rows in found.rejected.items()} == {
        "image.too_small": ["p9"],
        "image.undecodable": ["p10"],
        "pair.unchanged": ["p8", "p11"],
    }
    assert [row["error"] for row in found.failed] == ["the endpoint said 500 & <nothing> else"]
    shown = [*found.kept, *(row for rows in found.rejected.values() for row in rows), *found.failed]
    for row in shown:
        assert [each["role"] for each in row["pictures"]] == ["source", "target"]
    (damaged,) = found.rejected["image.undecodable"]
    assert damaged["pictures"][0]["url"] and not damaged["pictures"][1]["url"]
    assert "damaged" in damaged["pictures"][1]["note"]


def test_histograms_hold_every_value_and_threshold(output: Path) -> None:
    found = {histogram.name: histogram for histogram in inspect.inspect(str(output)).histograms}
    side = found["side"]
    assert {name: round(rows.sum(), 9) for name, rows in side.series.items()} == {
        "kept": GOOD,
        "rejected by this filter": 1,
        "rejected by another": 2,  # one was refused before its header was read
    }
    assert side.limits == {"min_side": 32.0}
    (line,) = side.lines()
    assert line["x"] == pytest.approx(420 * (32 - 20) / (96 - 20), abs=0.1)
    assert found["changed"].limits == {
        "min_changed": 0.001,
        "max_changed": 1.0,
        "min_changed of other": 0.2,
    }
    assert found["changed"].series["rejected by this filter"].sum() == 1
    heights = sum(bar["height"] for bar in side.bars())
    assert heights == pytest.approx(120 * (GOOD + 3) / (GOOD + 2), rel=0.01)
    assert found["pixels"].log and not side.log


def test_histograms_are_of_the_manifest_where_it_says_what_was_measured(output: Path) -> None:
    """So a page about millions of records does not read their measures again."""
    store = open_store(str(output))
    told, before = manifest.read(store), inspect.inspect(str(output)).render()
    assert told is not None and told.measured is None
    counts = histograms.count(pq.read_table(output / told.files[0].path))
    histograms.add(counts, histograms.count(pq.read_table(output / told.files[1].path)))
    manifest.write(store, told.model_copy(update={"measured": counts}))
    assert inspect.inspect(str(output)).render() == before
    manifest.write(store, told.model_copy(update={"measured": {"ssim": {"kept": {"0.5": 8}}}}))
    (drawn,) = inspect.inspect(str(output)).histograms
    assert drawn.name == "ssim" and drawn.limits == {"min_ssim": 0.1}


@pytest.mark.parametrize(
    ("measured", "told"),
    [
        ({"ssim": {"kept": {"<b>": 1}}}, "could not convert string to float"),
        ({"ssim": {"kept": {"nan": 1}}}, "'nan' is not a number"),
        ({"ssim": {"kept": {"1e999": 1}}}, "'1e999' is not a number"),
        ({"ssim": {"kept": {"1": -1}}}, "greater than or equal to 0"),
        ({"ssim": {"kept": 5}}, "should be an object"),
    ],
)
def test_measures_of_a_strangers_manifest_are_checked(
    output: Path, measured: Any, told: str
) -> None:
    path = output / "manifest.json"
    text = json.loads(path.read_text()) | {"measured": measured}
    path.write_text(json.dumps(text))
    with pytest.raises(StorageError, match=f"is no manifest: measured.*{told}"):
        inspect.inspect(str(output))


@pytest.mark.parametrize("rules", [5, {"min_ssim": "<b>"}, {"sources": 3}, {"sources": {"a": 1}}])
def test_settings_of_a_strangers_manifest_that_are_none_are_not_drawn(
    output: Path, rules: Any
) -> None:
    path = output / "manifest.json"
    text = json.loads(path.read_text())
    text["config"]["filters"] = rules
    text["measured"] = {"ssim": {"kept": {"0.5": 1}, "<i>": {"0.6": 2}}, "x": {"kept": {}}, "y": {}}
    path.write_text(json.dumps(text))
    found = inspect.inspect(str(output))
    assert [(each.name, each.limits) for each in found.histograms] == [("ssim", {})]
    assert "<i>" not in found.render()


def test_the_page_is_whole_and_safe(output: Path, tmp_path: Path, capsys: Any) -> None:
    page = tmp_path / "new" / "page.html"
    arguments = ["data", "inspect", str(output), "--page", str(page), "--samples", "3"]
    assert cli.execute(cli.root(), arguments, prog_name="dim") == 0
    assert "13 records: 8 kept, 4 rejected, 1 failed" in capsys.readouterr().out
    text = page.read_text()
    assert "<b>a box</b>" not in text and "&lt;b&gt;a box" in text and "&lt;nothing&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)', text) and "http" not in text
    urls = re.findall(r'src="data:image/jpeg;base64,([^"]+)"', text)
    assert len(urls) == 2 * 3 + 2 + 2 + 1 + 4  # kept, failed, too small, undecodable, unchanged
    for url in urls:
        image = Image.open(io.BytesIO(base64.b64decode(url)))
        assert max(image.size) <= 176 and np.asarray(image).std() > 1
    numbers = [int(n) for n in re.findall(r'</td><td class="number">([\d,]+)</td>', text)]
    assert sum(numbers[:-1]) == numbers[-1] == 13


def test_samples_are_spread_and_the_same_each_time(output: Path) -> None:
    first, second = (inspect.inspect(str(output), samples=3).kept for _ in range(2))
    assert [row["id"] for row in first] == [row["id"] for row in second]
    assert len(first) == 3 and [row["id"] for row in first] != ["p0", "p1", "p2"]
    assert inspect.inspect(str(output), samples=0).kept == []


def test_without_the_input_the_page_says_so(output: Path) -> None:
    (output.parent / "raw" / "manifest.json").unlink()
    found = inspect.inspect(str(output))
    assert "is not there any more" in found.no_pictures and found.no_pictures in found.render()
    assert all(row["pictures"] == [] for row in found.failed)


def test_a_server_that_only_a_manifest_names_is_not_asked(output: Path) -> None:
    """It would get a request that is signed with the key of whoever looks."""
    path = output / "manifest.json"
    told = json.loads(path.read_text())
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.setblocking(False)
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        told["config"]["raw"] = f"s3://b/raw?endpoint_override={endpoint}"
        path.write_text(json.dumps(told))
        said = inspect.inspect(str(output)).no_pictures
        with pytest.raises(BlockingIOError):
            server.accept()  # nobody has called
    assert said.endswith("on a server that only this output's manifest names.")
    for wrong in (5, ["s3://b"]):
        told["config"]["raw"] = wrong
        path.write_text(json.dumps(told))
        assert "no pictures of its own" in inspect.inspect(str(output)).no_pictures


def test_an_input_of_a_job_without_input_has_no_pictures(output: Path) -> None:
    found = inspect.inspect(str(output.parent / "raw"))
    assert found.rejected == {} and found.histograms == [] and len(found.kept) == 12
    assert "measures nothing" in found.render()


def test_files_that_do_not_hold_what_the_manifest_says_are_an_error(output: Path) -> None:
    path = output / "rejected" / "part-00000.parquet"
    pq.write_table(pq.read_table(path).slice(1), path)
    with pytest.raises(DimError, match=r"holds \(8, 3, 1\) .* says \(8, 4, 1\) of 13"):
        inspect.inspect(str(output))


def test_what_is_no_output_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        inspect.inspect(str(tmp_path / "none"))
    (tmp_path / "x").write_text("")
    with pytest.raises(InputError, match="is not finished"):
        inspect.inspect(str(tmp_path))
