from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dim import __version__, cli, provenance, tabletop
from dim import model as models
from dim.blueprint import Blueprint
from dim.images import save_png
from dim.model.checkpoint import content

EDIT = tabletop.sample_edit(np.random.default_rng([7, 0]))


def run(*arguments: str | Path) -> int:
    return cli.execute(cli.root(), [str(item) for item in arguments], prog_name="dim")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    save_png(tabletop.render(EDIT.source, 64), tmp_path / "photo.png")
    return tmp_path / "photo.png"


def same(path: Path, image: Image.Image) -> bool:
    return np.array_equal(np.asarray(Image.open(path)), np.asarray(image))


def test_edit_paints_from_the_designers_blueprint_and_shows_it(
    photo: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out" / "edited.png"
    arguments: Sequence[str | Path] = (
        "edit", photo, EDIT.instruction, "--model", tiny_model_dir, "--designer", "oracle",
        "--out", out, "--steps", "2", "--seed", "5",
    )  # fmt: skip
    assert run(*arguments) == 0
    shown = capsys.readouterr()
    assert str(out) in shown.err
    blueprint = Blueprint.parse(shown.out)
    expected = models.load(tiny_model_dir).edit(
        [Image.open(photo)],
        [EDIT.instruction],
        blueprints=[blueprint.render()],
        seeds=[5],
        steps=2,
    )[0]
    assert same(out, expected.image)
    said = provenance.read(out.read_bytes())
    assert said == {
        "model": tiny_model_dir.parent.name,
        "release": f"{tiny_model_dir.parent.name}@{content.of_path(tiny_model_dir)[:8]}",
        "model_hash": content.of_path(tiny_model_dir),
        "version": __version__,
        "seed": "5",
        "steps": "2",
        "guidance_scale": str(models.load(tiny_model_dir).config.sampling.guidance_scale),
        "blueprint_sha256": hashlib.sha256(blueprint.render().encode()).hexdigest(),
    }


def test_edit_with_a_blueprint_file_or_without_designer(
    photo: Path, tiny_model_dir: Path, tmp_path: Path
) -> None:
    text = tmp_path / "blueprint.txt"
    text.write_text("Paint it blue.\n")
    out = tmp_path / "edited.png"
    common = ("--model", tiny_model_dir, "--out", out, "--steps", "2")
    model = models.load(tiny_model_dir)
    assert run("edit", photo, "make it blue", "--blueprint", text, *common) == 0
    given = model.edit(
        [Image.open(photo)], ["make it blue"], blueprints=["Paint it blue."], steps=2
    )
    assert same(out, given[0].image)
    assert run("edit", photo, "make it blue", "--designer", "none", *common) == 0
    plain = model.edit([Image.open(photo)], ["make it blue"], steps=2)
    assert same(out, plain[0].image)
    said = provenance.read(out.read_bytes())
    assert said is not None and "blueprint_sha256" not in said
    assert said["seed"] == str(model.config.sampling.seed)


def test_edit_passes_a_negative_prompt_and_the_square_on(
    tiny_model_dir: Path, tmp_path: Path
) -> None:
    save_png(tabletop.render(EDIT.source, 64).resize((96, 64)), tmp_path / "wide.png")
    wide, out = tmp_path / "wide.png", tmp_path / "edited.png"
    common = ("--model", tiny_model_dir, "--designer", "none", "--out", out, "--steps", "2")
    model = models.load(tiny_model_dir)
    assert run("edit", wide, "make it blue", *common, "--negative-prompt", "red things") == 0
    options = {"negative_prompt": "red things", "steps": 2}
    assert same(out, model.edit([Image.open(wide)], ["make it blue"], **options)[0].image)
    assert run("edit", wide, "make it blue", *common, "--square") == 0
    square = model.edit([Image.open(wide)], ["make it blue"], fit="square", steps=2)[0]
    assert same(out, square.image) and square.image.size == (64, 64)


def test_edit_paints_until_the_designer_is_content_or_the_rounds_are_over(
    photo: Path, tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "edited.png"
    common = ("--model", tiny_model_dir, "--designer", "oracle", "--out", out, "--steps", "2")
    arguments = ("--seed", "5", "--rounds", "2", "--best-of", "2")
    assert run("edit", photo, EDIT.instruction, *common, *arguments) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if line.startswith("round")]
    assert [line.partition(":")[0].removesuffix(" (taken)") for line in lines] == [
        f"round {number}, seed {seed}" for number, seed in ((1, 5), (1, 6), (2, 7), (2, 8))
    ]
    (taken,) = [line for line in lines if "(taken)" in line]
    seed = int(taken.partition("seed ")[2].split()[0])
    expected = models.load(tiny_model_dir).edit(
        [Image.open(photo)], [EDIT.instruction], blueprints=[shown.out.strip()], seeds=[seed],
        steps=2,
    )[0]  # fmt: skip
    assert same(out, expected.image)
    said = provenance.read(out.read_bytes())
    assert said is not None and said["seed"] == str(seed)  # of the one that was taken
    plan = shown.out.strip()
    assert said["blueprint_sha256"] == hashlib.sha256(plan.encode()).hexdigest()


def test_generate_paints_the_size_asked_for(tiny_model_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "generated.png"
    arguments = ("--model", tiny_model_dir, "--out", out, "--steps", "2", "--size", "64x32")
    assert run("generate", "a red circle", *arguments) == 0
    expected = models.load(tiny_model_dir).generate(["a red circle"], size=(64, 32), steps=2)[0]
    assert same(out, expected)
    said = provenance.read(out.read_bytes())
    assert said is not None and (said["steps"], said["guidance_scale"]) == (
        "2", str(models.load(tiny_model_dir).config.sampling.guidance_scale),
    )  # fmt: skip
    assert said["model_hash"] == content.of_path(tiny_model_dir) and "lora" not in said


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["edit", "gone.png", "x", "--model", "MODEL"], 1, "image not found: gone.png"),
        (["edit", "TEXT", "x", "--model", "MODEL"], 1, "not an image"),
        (["edit", "PHOTO", "x", "--model", "nowhere"], 1, "nowhere"),
        (["edit", "PHOTO", "x", "--model", "MODEL", "--rounds", "2"], 1, "designer self cannot"),
        (["edit", "PHOTO", "", "--model", "MODEL", "--designer", "none"], 1, "empty"),
        (["edit", "PHOTO", "x", "--model", "MODEL", "--designer", "gtp"], 1, "unknown designer"),
        (["edit", "PHOTO", "x", "--model", "MODEL", "--designer", "self"], 1, "blueprint"),
        (["edit", "PHOTO", "x", "--model", "MODEL", "--blueprint", "gone.txt"], 1, "gone.txt"),
        (
            ["edit", "PHOTO", "x", "-m", "MODEL", "--blueprint", "TEXT", "--designer", "oracle"],
            1,
            "exclude each other",
        ),
        (["edit", "PHOTO", "x"], 2, "--model"),
        (["edit", "PHOTO", "x", "--model", "MODEL", "--steps", "0"], 2, "--steps"),
        (["generate", "x", "--model", "MODEL", "--size", "63x64"], 1, "cells of 16"),
        (["generate", "x", "--model", "MODEL", "--size", "large"], 1, "WIDTHxHEIGHT"),
        (["generate", " ", "--model", "MODEL"], 1, "empty"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else None,
)
def test_bad_input_is_one_line(
    arguments: list[str],
    code: int,
    said: str,
    photo: Path,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "text.txt"
    text.write_text("just words")
    places = {"MODEL": tiny_model_dir, "PHOTO": photo, "TEXT": text}
    assert run(*(places.get(item, item) for item in arguments)) == code
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert said in lines[0]
