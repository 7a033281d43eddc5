from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dim import records
from dim.errors import InputError, StorageError
from dim.features.samples import fingerprint, open_samples, read_rows

COLUMNS = ["id", "image", "image_target", "instruction"]


def test_rows_come_in_the_order_asked_for_across_shards(edit_data: str) -> None:
    dataset, rows = open_samples([edit_data], COLUMNS)
    assert rows == 20
    table = read_rows(dataset, COLUMNS, np.array([19, 0, 12, 0]))
    assert table.column("id").to_pylist() == ["edit-19", "edit-0", "edit-12", "edit-0"]
    assert table.column_names == COLUMNS


def test_several_data_sets_are_one(edit_data: str, held_out_data: str) -> None:
    dataset, rows = open_samples([edit_data, held_out_data], COLUMNS)
    assert rows == 25
    assert read_rows(dataset, ["id"], np.array([20])).column("id").to_pylist() == ["edit-0"]


def test_a_missing_column_is_named(t2i_data: str) -> None:
    with pytest.raises(InputError, match="lacks the column 'image_target'; it has id, index"):
        open_samples([t2i_data], COLUMNS)


def test_no_data_at_all(make_dataset: Callable[..., str], tmp_path: Path) -> None:
    empty = make_dataset("empty", [], records.EDIT)
    with pytest.raises(InputError, match=f"the training data in {empty} is empty"):
        open_samples([empty], COLUMNS)
    with pytest.raises(StorageError, match="nowhere does not exist"):
        open_samples([str(tmp_path / "nowhere")], COLUMNS)


def test_a_missing_value_is_named_with_its_sample(make_dataset: Callable[..., str]) -> None:
    rows = [{"id": f"r{i}", "index": i, "source": "s", "instruction": "x"} for i in range(4)]
    rows[2]["instruction"] = None
    dataset, _ = open_samples([make_dataset("gaps", rows, records.EDIT)], ["id", "instruction"])
    assert read_rows(dataset, ["id", "instruction"], np.array([0, 3])).num_rows == 2
    with pytest.raises(InputError, match="sample 'r2' has no instruction"):
        read_rows(dataset, ["id", "instruction"], np.arange(4))


def test_the_fingerprint_follows_the_content(
    edit_data: str, held_out_data: str, make_dataset: Callable[..., str]
) -> None:
    rows = [{"id": "a", "index": 0, "source": "s", "instruction": "x"}] * 2
    one, same = make_dataset("one", rows, records.EDIT), make_dataset("same", rows, records.EDIT)
    assert fingerprint([one]) == fingerprint([same]) != fingerprint([edit_data])
    assert fingerprint([edit_data, held_out_data]) != fingerprint([held_out_data, edit_data])
