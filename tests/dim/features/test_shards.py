from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dim import model as models
from dim import records
from dim.errors import InputError, SampleError
from dim.features.format import preparation_of
from dim.features.row_groups import ShardFile
from dim.features.shards import FeatureShards, ImageShards
from infra.samples import open_features
from tests.feature_shards import prepare, write_features

BOTH = ("blueprint", "instruction")


@pytest.fixture(scope="module")
def features(edit_data: str, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The features of twenty edits, one a row group, in three files."""
    return write_features(edit_data, tmp_path_factory.mktemp("features") / "out", tiny_model_dir)


def opened(*uris: str, texts: tuple[str, ...] = BOTH, edits: bool = True) -> FeatureShards:
    return open_features(uris, texts, edits=edits)


def copy_of(uri: str, folder: Path) -> Path:
    from infra.storage import download_folder

    download_folder(uri, folder)
    return folder


def test_rows_come_in_the_order_asked_for_from_any_file(features: str) -> None:
    shards = opened(features)
    assert shards.rows == 20 and shards.encoding == "bf16" and shards.edits
    rows = shards.read(np.array([19, 0, 12, 0, 7, 8]), ["blueprint_tokens"])
    assert [row["id"] for row in rows] == [f"edit-{n}" for n in (19, 0, 12, 0, 7, 8)]
    assert set(rows[0]) == {"id", "blueprint_tokens"}


def test_several_folders_are_one(
    features: str, held_out_data: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    more = write_features(held_out_data, tmp_path / "more", tiny_model_dir, group_bytes=1 << 20)
    shards = opened(features, more)
    assert shards.rows == 25
    rows = shards.read(np.array([24, 19, 20]), [])
    assert [row["id"] for row in rows] == ["edit-4", "edit-19", "edit-0"]


def test_only_the_row_groups_asked_for_are_read(
    features: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = opened(features)
    read: list[tuple[int, list[str]]] = []
    whole = pq.ParquetFile.read_row_groups

    def watched(self: Any, groups: list[int], columns: list[str], **options: Any) -> Any:
        read.append((len(groups), columns))
        return whole(self, groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", watched)
    shards.read(np.array([9, 2, 9]), ["instruction_states"])
    assert sorted(read) == [(1, ["id", "instruction_states"])] * 2


def test_a_text_that_was_not_made_is_named(
    edit_data: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    one = write_features(edit_data, tmp_path / "one", tiny_model_dir, texts=("blueprint",))
    assert opened(one, texts=("blueprint",)).rows == 20
    with pytest.raises(InputError, match="are of the texts blueprint, and this stage also trains"):
        opened(one)


def test_features_of_another_kind_of_record_are_refused(features: str) -> None:
    with pytest.raises(InputError, match="holds edit_features and this stage needs t2i_features"):
        opened(features, texts=("caption",), edits=False)


def test_a_file_that_vanishes_later_is_named(features: str, tmp_path: Path) -> None:
    copy = copy_of(features, tmp_path / "copy")
    shards = opened(str(copy))
    (copy / "data" / "part-00002.parquet").unlink()
    assert len(shards.read(np.array([0]), [])) == 1
    with pytest.raises(SampleError, match=r"cannot be read: not found: .*part-00002.parquet"):
        shards.read(np.array([19]), [])


def test_a_missing_value_is_named(features: str, tmp_path: Path) -> None:
    copy = copy_of(features, tmp_path / "copy")
    file = copy / "data" / "part-00000.parquet"
    table = pq.read_table(file)
    place = table.schema.get_field_index("latent")
    gaps = table["latent"].to_pylist()
    gaps[3] = None
    field = table.schema.field(place)
    table = table.set_column(place, field, pa.array(gaps, field.type))
    pq.write_table(table, file, row_group_size=1)
    text = (copy / "manifest.json").read_text()
    old = (Path(features) / "data" / file.name).stat().st_size
    (copy / "manifest.json").write_text(text.replace(str(old), str(file.stat().st_size)))
    with pytest.raises(InputError, match=r"sample 'edit-3' in .*part-00000.parquet has no latent"):
        opened(str(copy)).read(np.array([3]), ["latent"])


def test_no_features_at_all(
    make_dataset: Callable[..., str], tiny_model_dir: Path, tmp_path: Path
) -> None:
    empty = make_dataset("empty", [], records.EDIT)
    none = write_features(empty, tmp_path / "none", tiny_model_dir)
    with pytest.raises(InputError, match=f"the training data in {none} is empty"):
        opened(none)


def test_features_of_other_weights_or_another_resolution_are_stale(
    features: str, tiny_model_dir: Path
) -> None:
    shards = opened(features)
    shards.check_preparation(prepare(tiny_model_dir))
    other = models.load(tiny_model_dir)
    other.conditioner.model.model.language_model.norm.weight.data += 1
    with pytest.raises(InputError) as caught:
        shards.check_preparation(preparation_of(other, edits=True, resolution=128))
    said = str(caught.value)
    assert "\n" not in said and said.startswith(f"the features in {features} are stale")
    assert "the weights of the understanding model (" in said
    assert "the resolution (64 there, 128 here)" in said
    assert "autoencoder" not in said and "tokenizer" not in said


def test_folders_that_were_made_differently_do_not_mix(
    features: str, held_out_data: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    model = models.load(tiny_model_dir)
    model.autoencoder.network.register_to_config(scaling_factor=0.5)
    model.save(tmp_path / "model")
    other = write_features(held_out_data, tmp_path / "other", tmp_path / "model")
    with pytest.raises(InputError, match="made differently: the weights or the scale of the autoe"):
        opened(features, other)
    short = write_features(held_out_data, tmp_path / "short", tiny_model_dir, encoding="int8")
    with pytest.raises(InputError, match="made differently: the encoding"):
        opened(features, short)


def test_any_opened_file_will_do_and_messages_call_it_by_its_name(features: str) -> None:
    paths = sorted(Path(features, "data").glob("*.parquet"))
    files = [
        ShardFile(
            "the folder",
            f"the file {path.name}",
            pq.read_metadata(path).num_rows,
            partial(pq.ParquetFile, path),
        )
        for path in paths
    ]
    shards = FeatureShards(files, BOTH, edits=True, where="here")
    assert shards.rows == 20
    assert [row["id"] for row in shards.read(np.array([19, 3]), [])] == ["edit-19", "edit-3"]
    with pytest.raises(InputError, match=r"^the file part-00000.parquet holds edit_features and"):
        FeatureShards(files, BOTH, edits=False, where="here")
    with pytest.raises(InputError, match=r"^the features in the folder are of the texts"):
        FeatureShards(files, ["caption"], edits=True, where="here")
    with pytest.raises(InputError, match=r"^the training data in here is empty"):
        FeatureShards([], BOTH, edits=True, where="here")


def image_shards(table: pa.Table, folder: Path, columns: list[str], group: int = 2) -> ImageShards:
    """The table as one file of image shards with row groups of ``group`` rows."""
    path = folder / "some.parquet"
    pq.write_table(table, path, row_group_size=group)
    file = ShardFile("there", "some.parquet", table.num_rows, partial(pq.ParquetFile, path))
    return ImageShards([file], columns, where="here")


def test_images_are_rows_by_number_too(tmp_path: Path) -> None:
    table = pa.table({"id": ["a", "b", "c"], "image": [b"1", b"2", None], "more": [1, 2, 3]})
    shards = image_shards(table, tmp_path, ["id", "image"])
    assert shards.rows == 3
    assert shards.read(np.array([1, 0, 1])).to_pydict() == {
        "id": ["b", "a", "b"],
        "image": [b"2", b"1", b"2"],
    }
    with pytest.raises(SampleError, match="sample 'c' in some.parquet has no image") as caught:
        shards.read(np.array([2]))
    assert caught.value.reason == "missing_value"
    head = shards.head(2, "more")
    assert head is not None and head.to_pylist() == [1, 2]
    assert shards.head(2, "provenance") is None
    with pytest.raises(InputError, match="the training data in here lacks the column 'text'"):
        image_shards(table, tmp_path, ["id", "text"])
