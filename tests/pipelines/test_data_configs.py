from __future__ import annotations

from pathlib import Path

import pytest

from dim.config import load_config
from dim.errors import ConfigError
from pipelines.edit import EditConfig
from pipelines.features import FeaturesConfig
from pipelines.ingest import IngestConfig
from pipelines.job import JobConfig
from pipelines.t2i import T2IConfig
from workflows.workflow import load_workflow

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
EDIT = ["raw=in", "designer=oracle", "out=o"]
T2I = ["raw=in", "captioner=oracle", "out=o"]
FEATURES = ["data=in", "model=m", "out=o"]


@pytest.mark.parametrize(
    ("cls", "name", "given"),
    [
        (EditConfig, "data-edit.yaml", EDIT),
        (T2IConfig, "data-t2i.yaml", T2I),
        (FeaturesConfig, "data-features.yaml", FEATURES),
    ],
)
def test_the_files_for_photographs_hold_the_defaults(
    cls: type[JobConfig], name: str, given: list[str]
) -> None:
    assert load_config(cls, CONFIGS / name, given) == load_config(cls, None, given)


@pytest.mark.parametrize(
    ("cls", "name", "given"),
    [
        (EditConfig, "data-tabletop-edit.yaml", EDIT),
        (T2IConfig, "data-tabletop-t2i.yaml", T2I),
        (FeaturesConfig, "data-features-gpu.yaml", FEATURES),
    ],
)
def test_the_other_files_can_be_read(cls: type[JobConfig], name: str, given: list[str]) -> None:
    assert load_config(cls, CONFIGS / name, given) != load_config(cls, None, given)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ([], "give exactly one of pairs, images, tabletop, tabletop_images"),
        (["pairs=a", "tabletop=3"], "give exactly one"),
        (["tabletop=0"], "greater than or equal to 1"),
        (["tabletop=3", "kinds=[remove,dance]"], "unknown kind 'dance'"),
        (["tabletop=3", "objects=[4,3]"], r"between 2 and 6, not \[4, 3\]"),
        (["tabletop=3", "objects=[2,40]"], r"between 2 and 6, not \[2, 40\]"),
        (["tabletop=3", "outlines=2"], "outlines"),
        (["tabletop=3", "sizes=3"], "unknown key 'sizes' .*did you mean 'size'"),
        (["tabletop=3", "rows_per_file=0"], "rows_per_file"),
    ],
)
def test_wrong_settings_are_named(given: list[str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_config(IngestConfig, None, ["out=o", *given])


def test_the_demo_draws_from_a_world_checked_like_any_other(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"between 2 and 6, not \[4, 3\]"):
        load_workflow(CONFIGS / "demo.yaml", [f"out={tmp_path}", "objects=[4,3]"])


@pytest.mark.parametrize(("rows", "workers"), [(0, 1), (63, 1), (128, 2), (10_000, 3)])
def test_no_worker_holds_a_model_without_records_for_it(rows: int, workers: int) -> None:
    config = EditConfig(raw="r", out="o", designer="oracle", workers=3, batch_size=64)
    assert config.workers_for([{"rows": rows}]) == workers
