from __future__ import annotations

from pathlib import Path

import pytest

from dim.config import CONFIGS, load_config, shipped
from dim.errors import ConfigError
from dim.model.config import ModelConfig


def test_a_configuration_of_the_package_is_found_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = load_config(ModelConfig, CONFIGS / "tiny.yaml")
    monkeypatch.chdir(tmp_path)
    assert load_config(ModelConfig, "configs/tiny.yaml") == ours
    with pytest.raises(ConfigError, match=r"configuration file not found: configs/none\.yaml"):
        load_config(ModelConfig, "configs/none.yaml")
    with pytest.raises(ConfigError, match="not found: tiny.yaml"):
        load_config(ModelConfig, "tiny.yaml")


def test_a_file_that_lies_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("painter: {}\n")
    monkeypatch.chdir(tmp_path)
    assert shipped("configs/tiny.yaml") == "configs/tiny.yaml"
    assert shipped("configs/dim-4.6b.yaml") == str(CONFIGS / "dim-4.6b.yaml")


@pytest.mark.parametrize("address", ["s3://configs/a//b", "/configs/tiny.yaml", "models:/dim@a"])
def test_other_addresses_stay_as_they_are(address: str) -> None:
    assert shipped(address) == address
