from __future__ import annotations

import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from dim import model
from dim.errors import CheckpointError, InputError, StorageError
from dim.model.checkpoint import content
from dim.model.lora.adapter import LORA_FILE
from infra import storage
from infra.models import (
    adapter_here,
    check_reference,
    fingerprint,
    load_initial,
    on_this_machine,
    save_model,
)
from infra.storage import Store, open_store
from tests.conftest import ROOT


def test_a_folder_has_one_hash_however_it_is_read(tiny_model_dir: Path, tmp_path: Path) -> None:
    assert fingerprint(str(tiny_model_dir)) == content.of_path(tiny_model_dir)
    odd = tmp_path / "odd"
    (odd / "part").mkdir(parents=True)
    (odd / "part" / "large").write_bytes(os.urandom(100) * 30_000)
    (odd / "part-of").write_bytes(b"sorts between")
    (odd / ".hidden").write_bytes(b"")
    (odd / "linked").symlink_to(tiny_model_dir, target_is_directory=True)
    (odd / "link.json").symlink_to(tiny_model_dir / "dim.json")
    assert fingerprint(str(odd)) == content.of_path(odd)
    file = odd / "part-of"
    assert fingerprint(str(file)) == content.of_path(file)
    before = content.of_path(odd)
    (odd / "part" / "large").write_bytes(b"x" * 3_000_000)  # of the same size
    assert content.of_path(odd) != before


def test_a_model_comes_back_from_an_object_store(tiny_model_dir: Path, s3: str) -> None:
    first = model.load(tiny_model_dir)
    save_model(first, f"{s3}/some/model")
    again = load_initial(f"{s3}/some/model", edits=True)
    kept = first.state_dict()
    assert again.config.painter == first.config.painter
    assert all(torch.equal(kept[name], tensor) for name, tensor in again.state_dict().items())


def test_a_text_to_image_painter_is_widened_for_edits_only(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    narrow = model.load(tiny_model_dir)
    config = narrow.config.painter.model_copy(update={"source_latent": False})
    narrow = model.build(narrow.config.model_copy(update={"painter": config}))
    narrow.save(tmp_path / "t2i")
    assert not load_initial(str(tmp_path / "t2i"), edits=False).painter.takes_source
    wide = load_initial(str(tmp_path / "t2i"), edits=True)
    assert wide.painter.takes_source
    kernel, old = (m.painter.network.patch_embed.proj.weight for m in (wide, narrow))
    assert torch.equal(kernel[:, :8], old) and not kernel[:, 8:].any()


@pytest.fixture
def stored(tiny_model_dir: Path, s3: str) -> str:
    storage.upload_folder(str(tiny_model_dir), f"{s3}/model")
    return f"{s3}/model"


def test_a_model_in_an_object_store_is_fetched_once_a_machine(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIM_CACHE", str(tmp_path))
    fetched: list[str] = []
    download = storage.download_folder

    def slowly(uri: str, folder: str) -> None:
        fetched.append(uri)
        time.sleep(0.3)
        download(uri, folder)

    monkeypatch.setattr(storage, "download_folder", slowly)
    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(on_this_machine, [stored] * 4))
    assert len(set(places)) == 1 and fetched == [stored]
    assert model.load(places[0]).config.painter


def test_what_a_fetch_left_half_done_is_no_model(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIM_CACHE", str(tmp_path))
    left = tmp_path / f"{fingerprint(stored)}.part"
    left.mkdir()
    (left / "dim.json").write_text("half of it")
    assert model.load(on_this_machine(stored)).config.painter


def test_another_model_at_the_same_address_is_fetched_anew(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIM_CACHE", str(tmp_path))
    first = on_this_machine(stored)
    storage.open_store(stored).write("dim.json", b"{}")
    assert on_this_machine(stored) != first


def test_a_folder_that_is_written_anew_while_it_is_fetched_is_none(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIM_CACHE", str(tmp_path))
    download = storage.download_folder

    def late(uri: str, folder: str) -> None:
        storage.open_store(stored).write("dim.json", b"{}")
        download(uri, folder)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "download_folder", late)
        with pytest.raises(StorageError, match="was written anew while it was fetched: try again"):
            on_this_machine(stored)
    assert (on_this_machine(stored) / "dim.json").read_text() == "{}"


def test_an_export_that_is_cut_off_leaves_no_model_and_the_next_one_nothing_of_it(
    tiny_model_dir: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_, address = model.load(tiny_model_dir), f"{s3}/out/model"
    save_model(model_, address)
    store = storage.open_store(address)
    store.write("painter/diffusion_pytorch_model-00002-of-00002.safetensors", b"of an older one")
    copy_file = storage._copy_file

    def cut_off(source: Store, target: Store, name: str) -> None:
        if "painter" in name:
            raise StorageError("cut off")
        copy_file(source, target, name)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "_copy_file", cut_off)
        with pytest.raises(StorageError, match="cut off"):
            save_model(model_, address)
    assert store.is_file("connector.safetensors") and not store.exists("painter")
    with pytest.raises(CheckpointError, match="model is no finished folder: no dim.json"):
        on_this_machine(address)
    save_model(model_, address)
    names = [name for name, _ in storage.open_store(str(tiny_model_dir)).list()]
    assert [name for name, _ in store.list()] == names


def test_a_model_is_stored_with_a_reference_to_where_its_understanding_model_lies(
    tiny_model_dir: Path, s3: str
) -> None:
    save_model(model.load(tiny_model_dir), f"{s3}/light", "reference")
    assert not storage.exists(f"{s3}/light/understanding")
    again = load_initial(f"{s3}/light", edits=True)
    assert again.understanding_source == str(tiny_model_dir / "understanding")
    check_reference(f"{s3}/light")
    check_reference(str(tiny_model_dir))


def test_what_no_folder_can_refer_to_is_refused(stored: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="model holds a copy of its understanding model, which no"):
        check_reference(stored)
    random = tmp_path / "random.yaml"
    tiny = (ROOT / "configs" / "tiny.yaml").read_text()
    random.write_text(tiny.replace("package:tiny/understanding", "null"))
    with pytest.raises(InputError, match="yaml has a random understanding model: there is none"):
        check_reference(str(random))
    check_reference(str(ROOT / "configs" / "dim-4.6b.yaml"))


def test_a_place_that_is_not_ours_keeps_no_model(
    stored: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIM_CACHE", str(tmp_path / "file" / "below"))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot keep models .*; set DIM_CACHE"):
        on_this_machine(stored)
    monkeypatch.delenv("DIM_CACHE")
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    place = tmp_path / f"dim-models-{os.getuid()}"
    place.mkdir()
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    place.rename(tmp_path / f"dim-models-{uid + 1}")
    with pytest.raises(StorageError, match="belongs to somebody else; set DIM_CACHE"):
        on_this_machine(stored)


def test_an_adapter_in_an_object_store_is_fetched_with_its_weight(s3: str) -> None:
    open_store(f"{s3}/oil").write(LORA_FILE, b"numbers")
    here, _, weight = adapter_here(f"{s3}/oil:0.5").rpartition(":")
    assert weight == "0.5" and Path(here, LORA_FILE).read_bytes() == b"numbers"
    assert adapter_here(f"{s3}/oil") == here
    assert adapter_here("runs/oil:0.5") == "runs/oil:0.5"
    with pytest.raises(CheckpointError, match=f"no {LORA_FILE}"):
        adapter_here(f"{s3}/gone:1")
