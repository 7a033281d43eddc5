"""``--lora`` on the command line; what it makes of the weights is tested in ``dim/model/lora``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dim import cli, provenance, tabletop
from dim import model as models
from dim.images import save_png
from dim.model.checkpoint import content
from tests.dim.model.lora.adapters import EVERYTHING, make_adapter


def run(*arguments: object) -> int:
    return cli.execute(cli.root(), [str(item) for item in arguments], prog_name="dim")


@pytest.fixture(scope="module")
def adapters(editor: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    one = make_adapter(editor, folder / "one", seed=1, **EVERYTHING)
    return one, make_adapter(editor, folder / "two", seed=2, rank=2)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    edit = tabletop.sample_edit(np.random.default_rng([7, 0]))
    save_png(tabletop.render(edit.source, 64), tmp_path / "photo.png")
    return tmp_path / "photo.png"


def test_edit_and_generate_paint_with_adapters(
    editor: Path, adapters: tuple[Path, Path], photo: Path, tmp_path: Path
) -> None:
    one, two = adapters
    specs = [str(one), f"{two}:0.5"]
    given = [item for spec in specs for item in ("--lora", spec)]
    model = models.load(editor, lora=specs)
    out = tmp_path / "out.png"
    common = ("--model", editor, "--out", out, "--steps", 2, *given)
    assert run("edit", photo, "make it blue", "--designer", "none", *common) == 0
    edited = model.edit([Image.open(photo)], ["make it blue"], steps=2)[0].image
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(edited))
    plain = models.load(editor).edit([Image.open(photo)], ["make it blue"], steps=2)[0]
    assert not np.array_equal(np.asarray(plain.image), np.asarray(edited))
    assert run("generate", "a blue star", *common) == 0
    said = provenance.read(out.read_bytes()) or {}
    assert said["lora"] == f"{content.of_path(one)[:8]}:1, {content.of_path(two)[:8]}:0.5"
    painted = model.generate(["a blue star"], steps=2)[0]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(painted))


def test_merge_writes_a_whole_model(
    editor: Path,
    adapters: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = adapters
    out = tmp_path / "merged"
    assert run("model", "merge", editor, "--lora", one, "--lora", f"{two}:-1", "-o", out) == 0
    assert str(out) in capsys.readouterr().err
    assert run("model", "info", out) == 0
    wanted = models.load(editor, lora=[str(one), f"{two}:-1"]).state_dict()
    found = models.load(out).state_dict()
    assert all(np.array_equal(found[name].numpy(), each.numpy()) for name, each in wanted.items())


@pytest.mark.parametrize("command", ["edit", "generate", "merge", "serve"])
def test_a_bad_adapter_is_one_line(
    command: str,
    editor: Path,
    photo: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments: dict[str, tuple[object, ...]] = {
        "edit": ("edit", photo, "make it blue", "--model", editor),
        "generate": ("generate", "a star", "--model", editor),
        "merge": ("model", "merge", editor, "--out", tmp_path / "merged"),
        "serve": ("serve", "--model", editor, "--designer", "none"),
    }
    for spec, said in (
        (tmp_path / "gone", f"LoRA adapter not found: {tmp_path / 'gone'}"),
        (f"{photo}:0.5", f"{photo} is not a readable safetensors file"),
        (f"{photo}:much", "'much' is no weight"),
    ):
        assert run(*arguments[command], "--lora", spec) == 1
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and said in lines[0], lines
    assert not (tmp_path / "merged").exists()
