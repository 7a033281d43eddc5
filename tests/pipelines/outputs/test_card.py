"""The card says what the manifest and the records say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dim import cli, records
from dim.errors import ConfigError
from infra.storage import open_store
from pipelines.outputs import card
from pipelines.outputs.shards import Shards
from tests.pipelines.finished import edit_rows, finish

CONFIG = {
    "out": "here",
    "raw": "there",
    "filters": {"min_ssim": 0.1, "per_source": {"a|b": 0.2}},
    "licences": {"photos": "cc-by-4.0"},
    "workers": 3,
}


def made(folder: Path, **changes: Any) -> Shards:
    rows = [*edit_rows(20), *[{**row, "index": row["index"] + 20} for row in edit_rows(7, "web")]]
    finish(open_store(str(folder)), rows, **{"config": CONFIG, **changes})
    return Shards.open(str(folder), records.EDIT)


def front_matter(text: str) -> dict[str, Any]:
    _, front, _ = text.split("---\n", 2)
    return yaml.safe_load(front)


def test_the_card_tells_sources_reasons_words_settings_and_cost(tmp_path: Path) -> None:
    shards = made(tmp_path, cost={"requests": 27, "usd": 0.125})
    text = card.write(shards)
    assert (tmp_path / "README.md").read_text() == text
    assert "| photos | cc-by-4.0 | 16 | 3 | 1 |" in text
    assert "| web | not declared | 5 | 1 | 1 |" in text
    assert "| input | 27 |" in text and "| kept | 21 |" in text
    assert "| `pair.ssim_low` | 3 | 11.11% |" in text
    assert "| `pair.unchanged` | 1 | 3.70% |" in text
    words = [n + 1 for n in range(19) if n % 5 != 4] + [1, 2, 3, 4, 6]
    assert f"| {sum(words) / len(words):.1f} |" in text
    assert "| mean | p5 | p25 | p50 | p75 | p95 | p99 |" in text
    assert "| `filters.min_ssim` | 0.1 |" in text and "a\\|b" in text
    assert "workers" not in text and "there" not in text.split("## Settings")[1].split("##")[0]
    lines = text.splitlines()
    for number, line in enumerate(lines):  # a table is broken by a blank line within it
        if line.startswith("|") and lines[number - 1] == "":
            assert set(lines[number + 1]) <= set("|-:") and lines[number + 2].startswith("|")
    assert "\n\n\n" not in text
    assert "| usd | 0.125 |" in text and "| requests | 27 |" in text
    assert "| `image` | large_binary |" in text


def test_the_front_matter_is_what_the_hub_reads(tmp_path: Path) -> None:
    shards = made(tmp_path)
    front = front_matter(card.write(shards))
    assert front["license"] == "other"  # one source has one, the other none
    assert front["size_categories"] == ["n<1K"]
    assert front["configs"][0]["data_files"][0]["path"] == "data/*.parquet"
    both = {"photos": "cc-by-4.0", "web": "cc-by-4.0"}
    assert front_matter(card.render(shards, both))["license"] == "cc-by-4.0"

    import datasets

    loaded = datasets.load_dataset(
        str(tmp_path), split="train", cache_dir=str(tmp_path.parent / "cache")
    )
    assert loaded.num_rows == 21 and "reason" not in loaded.column_names


def test_a_licence_of_a_source_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no source 'phtos' in .*; there are photos, web"):
        card.render(made(tmp_path), {"phtos": "mit"})


def test_an_output_of_nothing_has_a_card(tmp_path: Path) -> None:
    finish(open_store(str(tmp_path)), [], config=CONFIG)  # with a licence of what is not there
    text = card.write(Shards.open(str(tmp_path), records.EDIT))
    assert "| input | 0 |" in text and "Words per prompt" not in text and "## Cost" not in text


def test_the_same_records_have_the_same_card(tmp_path: Path) -> None:
    assert card.render(made(tmp_path / "one")) == card.render(made(tmp_path / "two"))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made(tmp_path)
    arguments = ["data", "card", str(tmp_path), "licences.web=apache-2.0"]
    assert cli.execute(cli.root(), arguments, prog_name="dim") == 0
    assert capsys.readouterr().out.strip() == f"{tmp_path}/README.md"
    assert "| web | apache-2.0 |" in (tmp_path / "README.md").read_text()
    arguments[-1] = "licenses.web=apache-2.0"
    assert cli.execute(cli.root(), arguments, prog_name="dim") == 2
    assert "did you mean 'licences'" in capsys.readouterr().err
