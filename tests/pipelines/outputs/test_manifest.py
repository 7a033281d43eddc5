from __future__ import annotations

import json
from pathlib import Path

import pytest

from dim.errors import StorageError
from infra.storage import open_store
from pipelines.outputs import manifest
from pipelines.outputs.manifest import Counts, Manifest, differences


def counts(**changes: object) -> Counts:
    values = {"input": 6, "kept": 3, "rejected": 2, "failed": 1, "by_reason": {"a": 1, "b": 1}}
    return Counts.model_validate({**values, **changes})


def test_counts_add_up_or_do_not() -> None:
    assert counts().add_up()
    assert not counts(input=7).add_up()
    assert not counts(by_reason={"a": 1}).add_up()


def test_survives_the_store(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    assert manifest.read(store) is None
    written = Manifest(job="edit", config={"a": {"b": [1]}}, input={}, counts=counts(), files=())
    manifest.write(store, written)
    assert manifest.read(store) == written


@pytest.mark.parametrize("text", ["", "{", "[]", '{"job": "edit"}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    store = open_store(str(tmp_path))
    store.write(manifest.NAME, text.encode())
    with pytest.raises(StorageError, match=r"manifest.json is no manifest"):
        manifest.read(store)


def test_differences_have_dotted_names() -> None:
    old, new = {"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 5}, "e": 4}
    assert list(differences(old, new)) == [
        "a.c was 2 and is 5",
        "d was 3 and is None",
        "e was None and is 4",
    ]


def test_a_newer_manifest_is_refused_in_words(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    store.write(manifest.NAME, b'{"version": 3, "job": "edit", "parts": []}')
    with pytest.raises(StorageError, match="is of version 3, and this program knows 2 and older"):
        manifest.read(store)


def test_an_older_manifest_says_nothing_of_costs_and_measures(tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    old = Manifest(job="edit", config={}, input={}, counts=counts(), files=()).model_dump()
    del old["cost"], old["measured"]
    old["version"] = 1
    store.write(manifest.NAME, json.dumps(old).encode())
    found = manifest.read(store)
    assert found is not None and found.cost is found.measured is None


@pytest.mark.parametrize(
    "path",
    ["../x.parquet", "data/../../x", "/etc/passwd", "data//x", "./data/x", "..", "", "data/"],
)
def test_a_manifest_of_others_names_nothing_outside_its_folder(path: str, tmp_path: Path) -> None:
    store = open_store(str(tmp_path))
    file = {"path": "data/x.parquet", "rows": 1, "bytes": 1, "sha256": "0"}
    values = {"job": "edit", "config": {}, "input": {}, "counts": counts().model_dump()}
    store.write("manifest.json", json.dumps({**values, "files": [file]}).encode())
    assert manifest.read(store)
    wrong = {**values, "files": [{**file, "path": path}]}
    store.write("manifest.json", json.dumps(wrong).encode())
    with pytest.raises(StorageError, match=r"manifest.json is no manifest: files.0.path .*the nam"):
        manifest.read(store)


def test_credentials_are_in_no_manifest_also_not_in_one_that_has_them(tmp_path: Path) -> None:
    store, spec = open_store(str(tmp_path)), "openai:m@https://me:s3cret@host/v1"
    shown = {"designer": "openai:m@https://***@host/v1"}
    made = Manifest(job="edit", config={"designer": spec}, input={}, counts=counts(), files=())
    assert made.config == shown
    old = {**made.model_dump(), "config": {"designer": spec}, "input": {"uri": spec}}
    store.write(manifest.NAME, json.dumps(old).encode())
    found = manifest.read(store)
    assert found is not None and found.config == shown and "s3cret" not in str(found)
