from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dim import records
from dim.errors import InputError, StorageError
from infra.samples import fingerprint, holds_features, open_features, open_images
from infra.storage import download_folder
from tests.feature_shards import write_features

COLUMNS = ["id", "image", "image_target", "instruction"]


def test_rows_come_in_the_order_asked_for_across_shards(edit_data: str) -> None:
    images = open_images([edit_data], COLUMNS)
    assert images.rows == 20
    table = images.read(np.array([19, 0, 12, 0]))
    assert table.column("id").to_pylist() == ["edit-19", "edit-0", "edit-12", "edit-0"]
    assert table.column_names == COLUMNS


def test_several_data_sets_are_one(edit_data: str, held_out_data: str) -> None:
    images = open_images([edit_data, held_out_data], ["id"])
    assert images.rows == 25
    assert images.read(np.array([20])).column("id").to_pylist() == ["edit-0"]


def test_a_missing_column_is_named(t2i_data: str) -> None:
    with pytest.raises(InputError, match="lacks the column 'image_target'; .*has id, index"):
        open_images([t2i_data], COLUMNS)


def test_no_data_at_all(make_dataset: Callable[..., str], tmp_path: Path) -> None:
    empty = make_dataset("empty", [], records.EDIT)
    with pytest.raises(InputError, match=f"the training data in {empty} is empty"):
        open_images([empty], COLUMNS)
    with pytest.raises(StorageError, match="nowhere does not exist"):
        open_images([str(tmp_path / "nowhere")], COLUMNS)


def test_a_missing_value_is_named_with_its_sample(make_dataset: Callable[..., str]) -> None:
    rows = [{"id": f"r{i}", "index": i, "source": "s", "instruction": "x"} for i in range(4)]
    rows[2]["instruction"] = None
    images = open_images([make_dataset("gaps", rows, records.EDIT)], ["id", "instruction"])
    assert images.read(np.array([0, 3])).num_rows == 2
    with pytest.raises(InputError, match="sample 'r2' in .* has no instruction"):
        images.read(np.arange(4))


def test_the_fingerprint_follows_the_content(
    edit_data: str, held_out_data: str, make_dataset: Callable[..., str]
) -> None:
    rows = [{"id": "a", "index": 0, "source": "s", "instruction": "x"}] * 2
    one, same = make_dataset("one", rows, records.EDIT), make_dataset("same", rows, records.EDIT)
    assert fingerprint([one]) == fingerprint([same]) != fingerprint([edit_data])
    assert fingerprint([edit_data, held_out_data]) != fingerprint([held_out_data, edit_data])


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The features of twenty edits, one a row group, in three files."""
    return write_features(edit_data, tmp_path_factory.mktemp("features") / "out", tiny_model_dir)


def test_features_are_told_from_images_and_texts(
    features: str, edit_data: str, t2i_data: str
) -> None:
    assert holds_features([features]) and holds_features([features, features])
    assert not holds_features([edit_data, t2i_data])
    with pytest.raises(InputError, match=f"{features} holds features and {edit_data} does not"):
        holds_features([edit_data, features])
    with pytest.raises(InputError, match="holds features, and images are needed here"):
        open_images([features], ["id", "image"])


def test_a_file_that_is_cut_short_or_gone_is_named(features: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    download_folder(features, copy)
    file = copy / "data" / "part-00001.parquet"
    data = file.read_bytes()
    file.write_bytes(data[:-100])
    with pytest.raises(InputError, match=rf"part-00001.parquet has {len(data) - 100} bytes, and"):
        open_features([str(copy)], ["blueprint"], edits=True)
    file.unlink()
    with pytest.raises(InputError, match=r"part-00001.parquet is missing, and its manifest says"):
        open_features([str(copy)], ["blueprint"], edits=True)
    file.write_bytes(b"\0" * len(data))
    with pytest.raises(StorageError, match=r"cannot read .*part-00001.parquet"):
        open_features([str(copy)], ["blueprint"], edits=True)
