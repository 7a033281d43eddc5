from __future__ import annotations

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from dim import cli
from tests.dim.model.published import published

HEADS = ("--attention-head-dim", "8", "--cross-attention-head-dim", "6")


def run(*arguments: str | Path) -> int:
    return cli.execute(cli.root(), [str(item) for item in arguments], prog_name="dim")


def shown(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().out.split())


@pytest.fixture
def wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """No line of a table is broken."""
    monkeypatch.setenv("COLUMNS", "300")


@pytest.fixture
def places() -> tuple[str, ...]:
    """Frozen parts that fit a checkpoint of 8 latent channels and 128 hidden features."""
    return (
        "--understanding", "package:tiny/understanding",
        "--autoencoder", "package:tiny/autoencoder",
    )  # fmt: skip


@pytest.mark.usefixtures("wide_terminal")
def test_a_checkpoint_is_imported_shown_and_exported(
    places: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = published(hidden_size=128, channels=8, source=False)
    save_file(tensors, tmp_path / "model.safetensors")
    changes = ("--widen", "--task", "t2i", "--null-condition-tokens", "40")
    out = tmp_path / "dim"
    assert run("model", "import", tmp_path, "--out", out, *places, *HEADS, *changes) == 0
    first = shown(capsys)
    assert run("model", "info", out) == 0
    text = shown(capsys)
    assert text == first
    for fact in (
        "stage edit", "layers 3", "width 48", "input channels 16", "latent channels 8",
        "null table's rows 40", "understanding model package:tiny/understanding",
        f"imported from {tmp_path}", "checkpoint t2i, null table of 30 rows",
        "taken projector.*, decoder.model.*", "widened yes",
    ):  # fmt: skip
        assert fact in text
    assert re.search(r"painter .* F32 ", text) and re.search(r"understanding .* F16 ", text)
    back = tmp_path / "back" / "model.safetensors"
    assert run("model", "export", out, "--out", back) == 0
    assert shown(capsys) == str(back)
    assert load_file(back).keys() == tensors.keys()


@pytest.mark.usefixtures("wide_terminal")
def test_a_folders_settings_and_frozen_parts_can_be_taken(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "model.safetensors"
    assert run("model", "export", tiny_model_dir, "--out", file) == 0
    out = tmp_path / "dim"
    assert run("model", "import", file, "--out", out, "--config", tiny_model_dir) == 0
    assert "resolution in pixels 64" in shown(capsys)
    part = "painter/diffusion_pytorch_model.safetensors"
    assert (out / part).read_bytes() == (tiny_model_dir / part).read_bytes()
    assert run("model", "info", tiny_model_dir) == 0
    assert "provenance not an import" in shown(capsys)


def test_what_is_wrong_is_one_line(
    places: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "model.safetensors", tmp_path / "dim"

    def fails(*arguments: str | Path) -> str:
        assert run("model", *arguments) == 1
        [line] = capsys.readouterr().err.splitlines()
        return line

    assert "checkpoint not found" in fails("import", file, "--out", out, *places)
    assert "holds neither model.safetensors" in fails("import", tmp_path, "--out", out, *places)
    save_file(published(hidden_size=128, channels=8), file)
    assert "has no cross-attention heads of 112" in fails("import", file, "--out", out, *places)
    wrong = fails("import", file, "--out", out, *places, *HEADS, "--task", "t2i")
    assert "is an edit checkpoint" in wrong
    assert "model folder not found" in fails("info", out)
    assert "model folder not found" in fails("export", out, "--out", tmp_path / "x.safetensors")
    assert run("model", "import", file, "--out", out, "--task", "paint") == 2
    assert "--task" in capsys.readouterr().err
